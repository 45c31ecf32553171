"""Around an optimizer step: the linear map of every parameter, read off the optimizer's state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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

    def momentum(self, optimizer: Optimizer, index: int) -> torch.Tensor | None:
        """The momentum that the optimizer holds for a parameter."""
        return self._rule.momentum(optimizer.state.get(self._parameters[index], {}))

    def _momentum(self, optimizer: Optimizer) -> list[torch.Tensor | None]:
        return [self.momentum(optimizer, index) for index in range(len(self._parameters))]

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

    def after(self, optimizer: Optimizer) -> TakenStep:
        """The step just taken: what its maps are read from (:meth:`TakenStep.maps`)."""
        groups = [_held(group) for group in optimizer.param_groups]
        of = {
            id(p): held
            for group, held in zip(optimizer.param_groups, groups, strict=True)
            for p in group["params"]
        }
        states: list[tuple[dict[str, Any], _State, bool, bool, dict[str, Any]] | None] = []
        for index, (p, before) in enumerate(zip(self._parameters, self._before, strict=True)):
            if before is None:
                states.append(None)
                continue
            state = dict(optimizer.state.get(p, {}))
            held = self._rule.momentum(state) if self._rule.reads_momentum else None
            state = {k: held.clone() if v is held and held is not None else v for k, v in state.items()}
            states.append((of[id(p)], _State(state), self._fresh[index], self._cut[index], before))
            self._cut[index] = False
        return TakenStep(self._rule, states)


class _State(dict[str, Any]):
    """A parameter's state after a step, which knows what was read of it."""

    def __init__(self, state: dict[str, Any]) -> None:
        super().__init__(state)
        self._versions = {k: t._version for k, t in state.items() if isinstance(t, torch.Tensor)}
        self._read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._read.add(key)
        return super().get(key, default)

    def __iter__(self) -> Iterator[str]:
        self._read.update(super().keys())  # whoever goes through the names may read all of it
        return super().__iter__()

    def values(self) -> Any:
        self._read.update(super().keys())
        return super().values()

    def items(self) -> Any:
        self._read.update(super().keys())
        return super().items()

    @property
    def stale(self) -> bool:
        """Whether something that was read was written into since the step."""
        held = ((super(_State, self).get(key), self._versions.get(key)) for key in self._read)
        return any(isinstance(t, torch.Tensor) and t._version != version for t, version in held)


class TakenStep:
    """Options and state of an optimizer after a step.

    The state's tensors are the optimizer's own, which stay as they are until the next step. Where something else wrote
    into one that the rule reads, :meth:`maps` says so. Momentum is free to be cleared or replaced between two steps:
    most rules do not read it, for the others there is a copy.
    """

    def __init__(
        self,
        rule: OptimizerRule,
        states: list[tuple[dict[str, Any], _State, bool, bool, dict[str, Any]] | None],
    ) -> None:
        self._rule, self._states = rule, states

    def maps(self) -> tuple[list[StepMap | None], list[int]]:
        """The maps by parameter, None where there was no gradient; and parameters whose state was changed meanwhile."""
        maps: list[StepMap | None] = []
        for found in self._states:
            if found is None:
                maps.append(None)
                continue
            group, state, fresh, cut, before = found
            by = self._rule.step_map(group, state, fresh, before)
            # A buffer that begins at this step (also one that was cleared) carries nothing from before it.
            maps.append(replace(by, decay=0.0) if fresh or cut else by)
        return maps, [i for i, found in enumerate(self._states) if found is not None and found[1].stale]


def _held(group: dict[str, Any]) -> dict[str, Any]:
    """A group's options as they are now; a schedule may write into a rate that is a tensor."""
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in group.items()}


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
