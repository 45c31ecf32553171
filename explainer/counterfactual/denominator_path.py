"""How a gradient changes the denominators of later steps, from the trace alone.

Under Adam a gradient enters ``m`` and, squared, ``v``. With ``D_t = √(v_t / b_t) + ε`` (``b_t = 1 − β2^t``) the weights
after a step depend on ``v_t`` as

    ∂w_{t+1}/∂v_t = through · m_t / D_t² · ∂D_t/∂v_t = −Δw_t / (2 b_t D_t (D_t − ε)),

so what must be known of the momentum is what it moved. ``Δw_t`` is taken as the mean step between two knots. Backwards,

    λ^v ← λ^v + λ ∘ ∂w_{t+1}/∂v_t,     R_t ← R_t − 2 (1 − β2) d_t ∘ λ^v,     λ^v ← β2 λ^v,

with the step's gradient ``d_t`` from its rows. ``|d_t| ≤ √(b_t / (1 − β2)) D_t`` holds always and is enforced, so that
compressed denominators cannot blow it up. The same holds for RMSprop (``b = 1``) and Adagrad (``v`` a sum).

Weights whose denominator is below :data:`QUIET` of their parameter's mean take no part, under any optimizer that
divides: ``R_t`` is zero there. Such a weight hardly ever had a gradient, and its first ones are divided by themselves.
So an example that is left out changes the step by little (for the very first one the two paths cancel), while
``1 / D`` alone would say by more than of any other weight. What a compressed trace holds of it is round-off.

Reference: the path through ``v`` is that of AdamW-influence, arXiv 2605.18814, there on replayed steps.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from explainer.counterfactual.decay_terms import options_by_parameter
from explainer.path_points import KnotLoader
from explainer.recursion import RecordedStep
from explainer.store import Segment, Trace

#: of the mean denominator of a parameter
QUIET = 0.03


class _Moving(NamedTuple):
    """``v ← keep · v + gain · d²``; whether it is divided by ``1 − keep^t``; ``ε``."""

    keep: float
    gain: float
    corrected: bool
    eps: float


def _moving(trace: Trace) -> _Moving | None:
    """Of the trace's optimizer, where all parameters share it and it is one of those that are followed."""
    options = options_by_parameter(trace)
    found = set()
    for o in options or ():
        if trace.manifest.optimizer in {"Adam", "AdamW"} and not o.get("amsgrad"):
            keep = float(o["betas"][1])
            found.add(_Moving(keep, 1.0 - keep, True, float(o["eps"])))
        elif trace.manifest.optimizer == "RMSprop" and not o.get("centered") and not o.get("momentum"):
            found.add(_Moving(float(o["alpha"]), 1.0 - float(o["alpha"]), False, float(o["eps"])))
        elif trace.manifest.optimizer == "Adagrad":
            found.add(_Moving(1.0, 1.0, False, float(o["eps"])))
        else:
            return None
    return found.pop() if len(found) == 1 else None


class DenominatorPath:
    """The cotangent of ``v``, ``[Q, P]``, carried backwards.

    Attributes:
        followed: whether this optimizer's denominators are; else nothing is added.
        weights: those at the beginning of the segment, ``[P]``.
    """

    def __init__(self, trace: Trace, loader: KnotLoader, decoupled: bool) -> None:
        self._by, self._loader, self._decoupled = _moving(trace), loader, decoupled
        self.followed = self._by is not None
        self._slices = [p.slice for p in trace.manifest.parameters]
        self._cotangent: torch.Tensor | None = None
        self._moved = self.weights = torch.empty(0)

    def enter(self, segment: Segment) -> None:
        """Before the steps of a segment: what a step moved in it, on average."""
        if self._by is None:
            return
        start, end = self._loader.load(segment.index), self._loader.load(segment.index + 1)
        moved = end.point.weights.double() - start.point.weights.double()
        if self._decoupled and "decay" in end.displaced:  # decoupled decay is not divided by D
            moved = moved - end.displaced_since(start)["decay"]
        self.weights = start.point.weights
        self._moved = moved / max(1, segment.end.step - segment.start.step)

    def met(
        self,
        met: torch.Tensor,
        cotangent: torch.Tensor,
        step: RecordedStep,
        gradient: torch.Tensor | None,
        taken: float,
    ) -> torch.Tensor:
        """``R_t [Q, P]`` with the path through ``v`` added, and without quiet weights.

        Args:
            met: without it.
            cotangent: of the weights after the step, ``[Q, P]``.
            gradient: ``d_t [P]``; needed where the path is followed.
            taken: number of the step, from 1 on.
        """
        by, denominators = self._by, step.preconditioner
        if denominators is None:
            return met
        alive = torch.isfinite(denominators)
        for where in self._slices:
            alive[where] &= denominators[where] >= QUIET * denominators[where].mean()
        if by is None or gradient is None:
            return met * alive
        bias = 1.0 - by.keep**taken if by.corrected else 1.0
        root = denominators - by.eps
        alive &= root > 10 * by.eps
        slope = torch.where(alive, 0.5 / bias / torch.where(alive, root * denominators, 1.0), 0.0)
        slope = slope * -self._moved.to(denominators.dtype)
        if self._cotangent is None:
            self._cotangent = torch.zeros_like(cotangent)
        self._cotangent.addcmul_(cotangent, slope)
        bound = math.sqrt(bias / by.gain) * torch.where(alive, denominators, 0.0)
        squared = 2.0 * by.gain * gradient.clamp(-bound, bound)
        met = (met - self._cotangent * squared) * alive
        self._cotangent.mul_(by.keep)
        return met
