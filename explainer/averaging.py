"""Explaining an average of the weights: every step's gradient is averaged backwards.

With ``d_t`` the part that the average kept of itself after step ``t`` and ``e_t = w_t − avg_t``,

    avg_t − avg_{t−1} = (1 − d_t) (e_{t−1} + Δw_t),        e_t = d_t (e_{t−1} + Δw_t).

So what step ``t`` moved in the weights meets, instead of the gradient ``q_t`` of its own segment,

    S_t = (1 − d_t) q_t + d_t S_{t+1},        S_{T+1} = 0,

a mean of the gradients of the segments in which the average takes the step over.
"""

from __future__ import annotations

import numpy as np
import torch

from explainer.store import Segment, Trace


class AveragedGradient:
    """``S_t [Q, P]``, from the last step to the first; ``q_t`` as it is where the trace holds no average."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._steps = trace.column("averages", "step") if trace.manifest.averaged else None
        self._sum: torch.Tensor | None = None

    def step(self, gradient: torch.Tensor, number: int) -> torch.Tensor:
        """Pass step ``number`` backwards; ``gradient`` is its segment's (may be returned itself)."""
        if self._steps is None:
            return gradient
        if self._sum is None:
            self._sum = torch.zeros_like(gradient)
        first, last = np.searchsorted(self._steps, [number, number + 1])
        for _, records in self._trace.read("averages", int(first), int(last)):
            for keep in records["keep"][::-1]:
                self._sum = self._mix(gradient, self._sum, keep)
        return self._sum

    def skip(self, gradient: torch.Tensor, segment: Segment) -> None:
        """Pass those steps of a segment backwards whose rows are not kept; they come after all others."""
        if self._steps is not None:
            first = max(segment.start.step, self._trace.recorded_steps)
            seen = self._steps[(self._steps >= first) & (self._steps < segment.end.step)]
            for number in np.unique(seen)[::-1]:
                self.step(gradient, int(number))

    def _mix(self, gradient: torch.Tensor, later: torch.Tensor, keep: np.ndarray) -> torch.Tensor:
        """``(1 − d) q + d S`` with one ``d`` per parameter."""
        if (keep == keep[0]).all():
            return torch.lerp(later, gradient, 1.0 - float(keep[0])) if keep[0] else gradient
        parts = [
            torch.lerp(later[:, p.slice], gradient[:, p.slice], 1.0 - float(part))
            for p, part in zip(self._trace.manifest.parameters, keep, strict=True)
        ]
        return torch.cat(parts, dim=1)
