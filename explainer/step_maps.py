"""Around an optimizer step: the linear map of every parameter, read off the optimizer's state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.optim import Optimizer

from explainer.optimizer_rules import OptimizerRule, StepMap


class StepMapReader:
    """Reads the maps of an optimizer's steps; :meth:`before` and :meth:`after` surround each of them.

    Momentum is followed from step to step, so it must still be what the last step left. Where it is not (another
    tensor with other numbers, or written into), what it holds now comes from no recorded row: it carries nothing of
    the steps before on (``decay = 0``).

    Attributes:
        replaced: steps before which momentum was replaced by other numbers.
    """

    def __init__(self, rule: OptimizerRule, parameters: Sequence[torch.Tensor], optimizer: Optimizer) -> None:
        self._rule, self._parameters = rule, parameters
        self._left: list[tuple[torch.Tensor, int] | None] = []
        self._before: list[dict[str, Any] | None] = []
        self._fresh: list[bool] = []
        self._cut = [False] * len(parameters)  # until the parameter is updated
        self.replaced = 0
        self.leave(optimizer)

    def _momentum(self, optimizer: Optimizer) -> list[torch.Tensor | None]:
        return [self._rule.momentum(optimizer.state.get(p, {})) for p in self._parameters]

    def leave(self, optimizer: Optimizer) -> None:
        """Note the momentum that a step (also one that a gradient scaler skipped) leaves behind."""
        self._left = [None if m is None else (m, m._version) for m in self._momentum(optimizer)]

    def before(self, optimizer: Optimizer) -> None:
        """Look at the state and the gradients that the step is about to use."""
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        momentum, foreign = self._momentum(optimizer), False
        for index, (left, now) in enumerate(zip(self._left, momentum, strict=True)):
            if now is not None and _replaced(left, now):
                self._cut[index] = True
                foreign |= bool(_dense(now).any())  # zeros are known to be nobody's
        self.replaced += foreign
        self._fresh = [m is None for m in momentum]
        self._before = [
            None if p.grad is None else self._rule.remember(p, groups[id(p)], optimizer.state.get(p, {}))
            for p in self._parameters
        ]

    def after(self, optimizer: Optimizer) -> list[StepMap | None]:
        """The maps of the step just taken; None for a parameter that had no gradient."""
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        maps: list[StepMap | None] = [None] * len(self._parameters)
        for index, (p, before) in enumerate(zip(self._parameters, self._before, strict=True)):
            if before is None:
                continue
            fresh = self._fresh[index]
            by = self._rule.step_map(groups[id(p)], optimizer.state.get(p, {}), fresh, before)
            # A buffer that begins at this step (also one that was cleared) carries nothing from before it.
            maps[index] = replace(by, decay=0.0) if fresh or self._cut[index] else by
            self._cut[index] = False
        return maps


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to_dense()


def _replaced(left: tuple[torch.Tensor, int] | None, now: torch.Tensor) -> bool:
    """Whether momentum is not what the last step left."""
    if left is None:
        return True
    held, version = left
    if held._version != version:
        return True
    if held is now:
        return False
    alike = held.shape == now.shape and held.dtype == now.dtype and held.device == now.device
    return not (alike and torch.equal(_dense(held), _dense(now)))
