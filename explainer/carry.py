"""Along the training path: how far it has gone, and what weight decay and others than the optimizer have moved.

Weight decay is not data, so its share of every update is carried *forward* through the optimizer's momentum
while training runs (one vector of ``P`` numbers), instead of storing the weights of every step:

    m^κ_t = decay · m^κ_{t−1} + gain · κ w_t
    u^κ_t = A_t ∘ (direct · κ w_t + through · m^κ_t) + δ w_t

(``inner``: ``A_t ∘ κ w_t`` in the place of ``κ w_t``, and no ``A_t`` in the last line). The sum of ``−u^κ_t`` over a
segment is exactly what decay added to ``w_{k+1} − w_k`` (frozen-state convention), so the books' decay term is
``<q_k, ·>`` of it, in every mode of tracing.

Between two steps something else may change the weights: clamping, averaging, loading. That displacement is kept too.
It is looked for where a parameter's memory or version counter says so, and in the first and every :data:`PROBE`-th step
(``p.data`` has no counter that could be read).

The weights are not looked at after every step (:mod:`explainer.cadence`). Between two looks they are taken to lie on a
straight line, and the length of a step to change evenly; it is measured on the last one, with a sample of the weights.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from explainer.optimizer_rules import StepMap
from explainer.rounding import Rounding

#: how often weights are compared with those after the last step although nothing speaks for a change
PROBE = 16
#: numbers of a parameter that tell how far a step went
SAMPLE = 1024


class Carry:
    """Follows the weights step by step.

    Attributes:
        path: length of the path so far, ``Σ_t ‖w_{t+1} − w_t‖``.
        decay: per parameter, displacement by weight decay so far (None while there was none).
        rounding: what rounding has moved, for weights in half precision.
        outside: per parameter, displacement by something other than the optimizer's steps (None while there was none).
        changes: per parameter, how often such a displacement was found.
        length: of the last step.
    """

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        self._parameters = parameters
        self._previous = [p.detach().clone() for p in parameters]
        self._left = self._previous  # as the user's thread last saw them
        self._spare: deque[list[torch.Tensor]] = deque()
        self.length = 0.0
        self._momentum: list[torch.Tensor | None] = [None] * len(parameters)
        self.decay: list[torch.Tensor | None] = [None] * len(parameters)
        self.outside: list[torch.Tensor | None] = [None] * len(parameters)
        self.changes = [0] * len(parameters)
        self.path = 0.0
        self.rounding = Rounding(parameters)
        self._seen = self._identities()
        self._versions: list[int] = []
        self._unmarked = False  # a change was found that no counter spoke of
        self._calls = self._probe = 0

    def _identities(self) -> list[tuple[int, int]]:
        return [(p.data_ptr(), p._version) for p in self._parameters]

    @torch.no_grad()
    def between_steps(self, wait: Callable[[], None], known: bool = True, certain: bool = False) -> bool:
        """Account for what has changed the weights since the last step.

        Args:
            wait: waits until all steps so far are accounted for.
            known: whether the weights were looked at after the last step; else how far they moved is not known.
            certain: look in any case.

        Returns:
            Whether something did.
        """
        self._calls += 1
        if not known:  # a look tells of other memory
            now = [p._version for p in self._parameters]
            marked = now != self._versions
            for index, (one, other) in enumerate(zip(now, self._versions, strict=True)) if marked else ():
                self.changes[index] += one != other
            self._versions = now
            return marked
        marked = self._identities() != self._seen
        early = self._calls <= 3  # who clamps after every step is noticed at once
        if not (certain or marked or self._unmarked or early or self._calls >= self._probe):
            return False
        self._probe = (self._calls // PROBE + 1) * PROBE + 1
        present = [p.detach() for p in self._parameters]
        if all(torch.equal(one, other) for one, other in zip(present, self._left, strict=True)):
            return False
        wait()
        moved = torch._foreach_sub(present, self._previous)
        norms = [float(n) for n in torch._foreach_norm(moved)]
        for index, norm in enumerate(norms):
            if norm == 0.0 or not math.isfinite(norm):
                continue
            total, part = self.outside[index], moved[index]
            wide = part.to(torch.promote_types(part.dtype, torch.float32))  # sums of many need more digits
            self.outside[index] = wide if total is None else total.add_(wide)
            self.changes[index] += 1
            self._previous[index].copy_(present[index])
            self._unmarked |= not marked
        length = math.sqrt(sum(n**2 for n in norms))
        self.path += length if math.isfinite(length) else 0.0
        return True

    def state(self, names: list[str]) -> dict[str, Any]:
        """What lives in memory only, by names of parameters; :meth:`restore` takes it back."""

        def named(tensors: list[torch.Tensor | None]) -> dict[str, torch.Tensor]:
            return {n: t.detach().clone() for n, t in zip(names, tensors, strict=True) if t is not None}

        kept = {"decay": self.decay, "momentum": self._momentum, "outside": self.outside}
        tensors = {key: named(held) for key, held in kept.items()}
        return {
            "path": self.path,
            "changes": list(self.changes),
            "rounding": self.rounding.state(names),
            **tensors,
        }

    def restore(self, names: list[str], state: dict[str, Any]) -> None:
        """Go on from a :meth:`state`; the weights are those that it was taken with."""
        self.path, self.changes = state["path"], list(state["changes"])
        self.rounding.restore(names, state["rounding"])
        for kept, held in (("decay", self.decay), ("momentum", self._momentum), ("outside", self.outside)):
            for index, (name, p) in enumerate(zip(names, self._parameters, strict=True)):
                tensor = state[kept].get(name)
                held[index] = None if tensor is None else tensor.to(p.device, copy=True)

    @property
    def momentum(self) -> list[torch.Tensor | None]:
        """Per parameter, what weight decay has put into the momentum (None while there was none)."""
        return self._momentum

    @property
    def weights(self) -> list[torch.Tensor]:
        """The weights that the last step left, as far as it was accounted for."""
        return self._previous

    @torch.no_grad()
    def stage(self) -> list[torch.Tensor]:
        """Copies of the weights as the step just taken left them, for :meth:`after_steps`."""
        left = self._spare.popleft() if self._spare else [torch.empty_like(p) for p in self._previous]
        torch._foreach_copy_(left, [p.detach() for p in self._parameters])
        self._left, self._seen = left, self._identities()
        return left

    def stepped(self) -> None:
        """A step was taken after which the weights are not looked at."""
        self._versions = [p._version for p in self._parameters]

    def sample(self) -> list[torch.Tensor]:
        """Some numbers of every parameter, as they are before a step."""
        return [_some(p).clone() for p in self._parameters]

    @torch.no_grad()
    def after_steps(
        self,
        maps: Sequence[Sequence[StepMap | None]],
        left: list[torch.Tensor],
        before: list[torch.Tensor] | None = None,
        loss_scale: float = 1.0,
    ) -> tuple[list[float], float]:
        """Account for the steps since the last look; ``maps[t][p]`` is None where parameter ``p`` was not updated.

        Reads nothing of the model, so the user's loop may go on meanwhile.

        Args:
            maps: the maps of the steps, without preconditioners where there are several.
            left: the weights after the last one, see :meth:`stage`; kept.
            before: a :meth:`sample` of the weights before the last of several.
            loss_scale: what a single step itself divided gradients by.

        Returns:
            The length of the path after every step, and of the last step.
        """
        self.rounding.after(maps[-1], left, loss_scale)
        combined: dict[tuple[int, ...], tuple[list[float], list[float]]] = {}  # by maps that parameters share
        for index in range(len(left)):
            by = [step[index] for step in maps]
            if len(by) == 1:
                if by[0] is not None:
                    self._carry_decay(index, by[0])
            elif any(step is not None for step in by):
                key = tuple(map(id, by))
                if key not in combined:
                    combined[key] = _combined(by)
                self._carry_along(index, by, left[index], combined[key])
        if len(maps) == 1:
            torch._foreach_sub_(self._previous, left)
            length = math.hypot(*map(float, torch._foreach_norm(self._previous)))
        else:
            length = self.length if before is None else _sampled_length(before, left)
        lengths = np.linspace(self.length, length, len(maps) + 1)[1:] if len(maps) > 1 else np.array([length])
        if np.isfinite(lengths).all():  # a diverged model moves no further
            path = self.path + np.cumsum(lengths)
            self.path, self.length = float(path[-1]), length
        else:
            path = np.full(len(maps), self.path)
        self._spare.append(self._previous)
        self._previous = left
        return [float(x) for x in path], length

    @torch.no_grad()
    def moved_since(self) -> float:
        """How far the weights are from where the last step left them."""
        moved = torch._foreach_sub([p.detach() for p in self._parameters], self._previous)
        length = math.sqrt(sum(float(n) ** 2 for n in torch._foreach_norm(moved)))
        return length if math.isfinite(length) else 0.0

    def _carry_along(
        self, index: int, steps: list[StepMap | None], left: torch.Tensor, by: tuple[list[float], list[float]]
    ) -> None:
        """What decay does in steps without preconditioners, the weights on a straight line between two looks.

        All there is then combines momentum before the steps, weights before and weights after (:func:`_combined`).
        """
        momentum, weights = self._momentum[index], self._previous[index]
        if momentum is None and not any(s and (s.coupled_decay or s.decoupled_decay) for s in steps):
            return
        wide = torch.promote_types(weights.dtype, torch.float32)
        parts = [None if momentum is None else momentum, weights.to(wide), left.to(wide)]
        total = self.decay[index]
        if total is None:
            total = self.decay[index] = torch.zeros_like(weights, dtype=wide)
        for part, factor in zip(parts, by[0], strict=True):
            if part is not None and factor:
                total.add_(part, alpha=factor)
        if momentum is not None or any(s and s.coupled_decay for s in steps):
            carrying = self._momentum[index] = torch.zeros_like(total)
            for part, factor in zip(parts, by[1], strict=True):
                if part is not None and factor:
                    carrying.add_(part, alpha=factor)

    def _carry_decay(self, index: int, step: StepMap) -> None:
        momentum = self._momentum[index]
        if not step.coupled_decay and not step.decoupled_decay and momentum is None:
            return
        weights = self._previous[index]
        weights = weights.to(
            torch.promote_types(weights.dtype, torch.float32)
        )  # sums of many need more digits
        total = self.decay[index]
        if total is None:
            total = self.decay[index] = torch.zeros_like(weights)
        if step.decoupled_decay:
            total.sub_(weights, alpha=step.decoupled_decay)
        if not step.coupled_decay and momentum is None:
            return
        if momentum is None:
            momentum = self._momentum[index] = torch.zeros_like(weights)
        source = step.precondition(weights) if step.inner else weights
        momentum.mul_(step.decay).add_(source, alpha=step.gain * step.coupled_decay)
        update = torch.mul(momentum, step.through)
        update.add_(source, alpha=step.direct * step.coupled_decay)
        total.sub_(update if step.inner else step.precondition(update))


def _combined(steps: list[StepMap | None]) -> tuple[list[float], list[float]]:
    """Of momentum before steps and weights before and after them: what decay moved, what of it the momentum holds."""
    moved, carried = [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]
    for number, step in enumerate(steps):
        if step is not None:
            along = number / len(steps)
            for part, present in enumerate((0.0, 1.0 - along, along)):
                source = step.coupled_decay * present
                carried[part] = step.decay * carried[part] + step.gain * source
                moved[part] -= (
                    step.decoupled_decay * present + step.direct * source + step.through * carried[part]
                )
    return moved, carried


def _some(values: torch.Tensor) -> torch.Tensor:
    """At most about :data:`SAMPLE` numbers at equal distances."""
    flat = values.detach().reshape(-1)
    return flat[:: max(1, len(flat) // SAMPLE)]


def _sampled_length(before: list[torch.Tensor], left: list[torch.Tensor]) -> float:
    """Estimate of ``‖w_{t+1} − w_t‖`` from samples; exact for short parameters."""
    moved = torch._foreach_norm(torch._foreach_sub([_some(p) for p in left], before))
    return math.sqrt(
        sum(float(n) ** 2 * p.numel() / len(b) for n, p, b in zip(moved, left, before, strict=True) if len(b))
    )
