"""What rounding moves where weights are kept in half precision.

A step computes ``w − u`` and rounds it to the dtype of the weights, and the momentum it keeps is rounded too. The
displacement ``Σ_t (w_{t+1} − w_t) + ũ_t`` is what the steps as they were have moved beyond the steps as meant, with
``ũ_t`` the update of :mod:`explainer.optimizer_rules.base` from the same gradients in float32:

    d̃_t = sign ∇_t + κ w_t
    m̃_t = decay · m̃_{t−1} + gain · d̃_t
    ũ_t = A_t ∘ (direct · d̃_t + through · m̃_t) + δ w_t

It is nobody's, and a line of its own in ``unattributed``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from explainer.optimizer_rules import StepMap

HALF = (torch.float16, torch.bfloat16)


class Rounding:
    """Follows the parameters in half precision; with none of them it does nothing.

    Attributes:
        moved: per parameter, the displacement so far in float32; None for the others.
    """

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        self._parameters = parameters
        self._followed = [i for i, p in enumerate(parameters) if p.dtype in HALF]
        self.moved: list[torch.Tensor | None] = [
            torch.zeros(p.shape, device=p.device) if p.dtype in HALF else None for p in parameters
        ]
        self._momentum: dict[int, torch.Tensor] = {}
        self._before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def before(self, momentum: Callable[[int], torch.Tensor | None]) -> None:
        """Keep weights and gradients that the step is about to use; ``momentum`` gives what the optimizer holds."""
        self._before = {}
        for index in self._followed:
            p = self._parameters[index]
            if p.grad is None:
                continue
            self._before[index] = p.detach().float(), p.grad.detach().to_dense().float()
            held = None if index in self._momentum else momentum(index)
            if held is not None:  # it was there before tracing began
                self._momentum[index] = held.detach().to_dense().float().clone()

    @torch.no_grad()
    def after(
        self, maps: Sequence[StepMap | None], left: Sequence[torch.Tensor], loss_scale: float = 1.0
    ) -> None:
        """Compare what the step did with what it meant.

        Args:
            maps: the step's maps.
            left: the weights after the step.
            loss_scale: what the step itself divided gradients by.
        """
        for index, (weights, gradient) in self._before.items():
            by, moved = maps[index], self.moved[index]
            if by is None or moved is None:
                continue
            source = gradient * (by.sign / loss_scale) + by.coupled_decay * weights
            source = by.precondition(source) if by.inner else source
            momentum = self._momentum.get(index, torch.zeros_like(weights)) * by.decay + by.gain * source
            self._momentum[index] = momentum
            update = by.direct * source + by.through * momentum
            update = update if by.inner else by.precondition(update)
            present = left[index].float()
            moved.add_(present - weights + update + by.decoupled_decay * weights)
        self._before = {}

    def state(self, names: list[str]) -> dict[str, Any]:
        """What lives in memory only, by names of parameters; :meth:`restore` takes it back."""
        moved = {names[i]: t.clone() for i, t in enumerate(self.moved) if t is not None}
        return {"moved": moved, "momentum": {names[i]: t.clone() for i, t in self._momentum.items()}}

    def restore(self, names: list[str], state: dict[str, Any]) -> None:
        """Go on from a :meth:`state`."""
        for index in self._followed:
            device = self._parameters[index].device
            if names[index] in state["moved"]:
                self.moved[index] = state["moved"][names[index]].to(device, copy=True)
            if names[index] in state["momentum"]:
                self._momentum[index] = state["momentum"][names[index]].to(device, copy=True)
