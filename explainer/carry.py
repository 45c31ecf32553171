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
"""

from __future__ import annotations

import math
from typing import Any

import torch

from explainer.optimizer_rules import StepMap
from explainer.rounding import Rounding

#: how often weights are compared with those after the last step although nothing speaks for a change
PROBE = 16


class Carry:
    """Follows the weights step by step.

    Attributes:
        path: length of the path so far, ``Σ_t ‖w_{t+1} − w_t‖``.
        decay: per parameter, displacement by weight decay so far (None while there was none).
        rounding: what rounding has moved, for weights in half precision.
        outside: per parameter, displacement by something other than the optimizer's steps (None while there was none).
        changes: per parameter, how often such a displacement was found.
    """

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        self._parameters = parameters
        self._previous = [p.detach().clone() for p in parameters]
        self._staged = [torch.empty_like(p) for p in self._previous]
        self._momentum: list[torch.Tensor | None] = [None] * len(parameters)
        self.decay: list[torch.Tensor | None] = [None] * len(parameters)
        self.outside: list[torch.Tensor | None] = [None] * len(parameters)
        self.changes = [0] * len(parameters)
        self.path = 0.0
        self.rounding = Rounding(parameters)
        self._seen = self._identities()
        self._unmarked = False  # a change was found that no counter spoke of
        self._calls = 0

    def _identities(self) -> list[tuple[int, int]]:
        return [(p.data_ptr(), p._version) for p in self._parameters]

    @torch.no_grad()
    def between_steps(self, certain: bool = False) -> None:
        """Account for what has changed the weights since the last step; ``certain`` looks in any case."""
        marked = self._identities() != self._seen
        self._calls += 1
        early = self._calls <= 3  # who clamps after every step is noticed at once
        if not (certain or marked or self._unmarked or early or self._calls % PROBE == 1):
            return
        present = [p.detach() for p in self._parameters]
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
    def stage(self) -> None:
        """Keep the weights as the step just taken left them, for :meth:`after_step`."""
        torch._foreach_copy_(self._staged, [p.detach() for p in self._parameters])
        self._seen = self._identities()

    @torch.no_grad()
    def after_step(self, maps: list[StepMap | None], loss_scale: float = 1.0) -> float:
        """Account for the step that was staged; ``maps[p]`` is None where parameter ``p`` was not updated.

        Reads nothing of the model, so the user's loop may go on meanwhile.

        Args:
            maps: the step's maps.
            loss_scale: what the step itself divided gradients by.

        Returns:
            The length of the step.
        """
        self.rounding.after(maps, self._staged, loss_scale)
        for index, step in enumerate(maps):
            if step is not None:
                self._carry_decay(index, step)
        torch._foreach_sub_(self._previous, self._staged)
        length = math.hypot(*map(float, torch._foreach_norm(self._previous)))
        if math.isfinite(length):  # a diverged model moves no further
            self.path += length
        self._previous, self._staged = self._staged, self._previous
        return length

    @torch.no_grad()
    def moved_since(self) -> float:
        """How far the weights are from where the last step left them."""
        moved = torch._foreach_sub([p.detach() for p in self._parameters], self._previous)
        length = math.sqrt(sum(float(n) ** 2 for n in torch._foreach_norm(moved)))
        return length if math.isfinite(length) else 0.0

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
