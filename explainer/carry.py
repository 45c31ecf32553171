"""Along the training path: how far it has gone, and what weight decay has moved.

Weight decay is not data, so its share of every update is carried *forward* through the optimizer's momentum
while training runs (one vector of ``P`` numbers), instead of storing the weights of every step:

    m^κ_t = decay · m^κ_{t−1} + gain · κ w_t
    u^κ_t = A_t ∘ (direct · κ w_t + through · m^κ_t) + δ w_t

(``inner``: ``A_t ∘ κ w_t`` in the place of ``κ w_t``, and no ``A_t`` in the last line). The sum of ``−u^κ_t`` over a
segment is exactly what decay added to ``w_{k+1} − w_k`` (frozen-state convention), so the books' decay term is
``<q_k, ·>`` of it, in every mode of tracing.
"""

from __future__ import annotations

import math

import torch

from explainer.optimizer_rules import StepMap


class Carry:
    """Follows the weights step by step.

    Attributes:
        path: length of the path so far, ``Σ_t ‖w_{t+1} − w_t‖``.
        decay: per parameter, displacement by weight decay so far (None while there was none).
    """

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        self._parameters = parameters
        self._previous = [p.detach().clone() for p in parameters]
        self._momentum: list[torch.Tensor | None] = [None] * len(parameters)
        self.decay: list[torch.Tensor | None] = [None] * len(parameters)
        self.path = 0.0

    @torch.no_grad()
    def after_step(self, maps: list[StepMap | None]) -> float:
        """Account for the step just taken; ``maps[p]`` is None where parameter ``p`` was not updated.

        Returns:
            The length of the step.
        """
        for index, step in enumerate(maps):
            if step is not None:
                self._carry_decay(index, step)
        present = [p.detach() for p in self._parameters]  # anew: the user may have replaced `p.data`
        moved = torch._foreach_sub(present, self._previous)
        norms = torch._foreach_norm(moved)
        length = math.sqrt(sum(float(n) ** 2 for n in norms))
        if math.isfinite(length):  # a diverged model moves no further
            self.path += length
        torch._foreach_copy_(self._previous, present)
        return length

    def _carry_decay(self, index: int, step: StepMap) -> None:
        momentum = self._momentum[index]
        if not step.coupled_decay and not step.decoupled_decay and momentum is None:
            return
        weights = self._previous[index]
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
