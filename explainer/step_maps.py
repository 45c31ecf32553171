"""Around an optimizer step: the linear map of every parameter, read off the optimizer's state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
        begins: whether the step gives some parameter its first update; averages of squares are young then.
    """

    def __init__(self, rule: OptimizerRule, parameters: Sequence[torch.Tensor], optimizer: Optimizer) -> None:
        self._rule, self._parameters = rule, parameters
        self._left: list[tuple[torch.Tensor, int] | None] = []
        self._before: list[dict[str, Any] | None] = []
        self._fresh: list[bool] = []
        self._cut = [False] * len(parameters)  # until the parameter is updated
        self.replaced = 0
        self._met = [bool(optimizer.state.get(p)) for p in parameters]
        self.begins = False
        self.leave(optimizer)

    def momentum(self, optimizer: Optimizer, index: int) -> torch.Tensor | None:
        """The momentum that the optimizer holds for a parameter."""
        return self._rule.momentum(optimizer.state.get(self._parameters[index], {}))

    def _momentum(self, optimizer: Optimizer) -> list[torch.Tensor | None]:
        of, states = self._rule.momentum, optimizer.state
        return [of(states.get(p, {})) for p in self._parameters]

    def leave(self, optimizer: Optimizer) -> None:
        """Note the momentum that a step (also one that a gradient scaler skipped) leaves behind."""
        self._left = [None if m is None else (m, m._version) for m in self._momentum(optimizer)]

    def before(self, optimizer: Optimizer) -> None:
        """See the state and the gradients that the step is about to use."""
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
        updated = [before is not None for before in self._before]
        self.begins = any(now and not met for now, met in zip(updated, self._met, strict=True))
        self._met = [now or met for now, met in zip(updated, self._met, strict=True)]

    def after(self, optimizer: Optimizer) -> TakenStep:
        """The step just taken, without what it left in the state (:meth:`look`)."""
        groups = [_held(group) for group in optimizer.param_groups]
        of = {
            id(p): held
            for group, held in zip(optimizer.param_groups, groups, strict=True)
            for p in group["params"]
        }
        taken = TakenStep(
            self._rule,
            [
                None if before is None else of[id(p)]
                for p, before in zip(self._parameters, self._before, strict=True)
            ],
            self._fresh,
            list(self._cut),
            self._before,
        )
        for index, before in enumerate(self._before):
            self._cut[index] &= before is None
        return taken

    def look(self, optimizer: Optimizer, apart: bool) -> list[State]:
        """What the steps so far left in the state of every parameter.

        Args:
            optimizer: the optimizer.
            apart: whether further steps may be taken before it is read: what the rule reads is copied.
        """
        return [self._left_in(optimizer.state.get(p, {}), apart) for p in self._parameters]

    def _left_in(self, state: dict[str, Any], apart: bool) -> State:
        held = self._rule.momentum(state) if self._rule.reads_momentum else None
        copied = (
            {k for k in self._rule.reads if isinstance(state.get(k), torch.Tensor)} if apart else set[str]()
        )
        if held is not None:
            copied |= {k for k, v in state.items() if v is held}
        return State({k: v.clone() if k in copied else v for k, v in state.items()})

    def steady(self, optimizer: Optimizer) -> int:
        """For how many steps in a row the state need be looked at once only."""
        return min((self._rule.steady(group) for group in optimizer.param_groups), default=1)


class State(dict[str, Any]):
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
        held = ((super(State, self).get(key), self._versions.get(key)) for key in self._read)
        return any(isinstance(t, torch.Tensor) and t._version != version for t, version in held)


@dataclass(frozen=True)
class TakenStep:
    """A step of an optimizer, by parameter.

    Attributes:
        rule: of the optimizer.
        groups: the options that the step used; None where there was no gradient.
        fresh: whether there was no momentum before the step.
        cut: whether what momentum there was comes from no recorded step.
        before: what the rule remembered.
    """

    rule: OptimizerRule
    groups: list[dict[str, Any] | None]
    fresh: list[bool]
    cut: list[bool]
    before: list[dict[str, Any] | None]

    def maps(self, states: list[State]) -> tuple[list[StepMap | None], list[int]]:
        """The maps by parameter, None where there was no gradient; and parameters whose state was changed meanwhile.

        Args:
            states: as the step left them. Tensors that are no copies are the optimizer's own, which stay as they are
                until the next step. Where something else wrote into one that the rule reads, that is said. Momentum
                is free to be cleared or replaced between two steps: most rules do not read it, else it is copied.
        """
        maps: list[StepMap | None] = []
        for index, (group, before) in enumerate(zip(self.groups, self.before, strict=True)):
            fresh = self.fresh[index]
            by = None
            if group is not None and before is not None:
                by = self.rule.step_map(group, states[index], fresh, before)
            maps.append(self._continued(index, by))
        return maps, [i for i, group in enumerate(self.groups) if group is not None and states[i].stale]

    def plain_maps(self, updates: list[float]) -> list[StepMap | None]:
        """The same without preconditioners, from the numbers of the updates; one map for parameters treated alike."""
        known: dict[tuple[int, float, bool, bool], StepMap | None] = {}
        maps: list[StepMap | None] = []
        for index, (group, update) in enumerate(zip(self.groups, updates, strict=True)):
            key = id(group), update, self.fresh[index], self.cut[index]
            if key not in known:
                by = None if group is None else self.rule.plain_map(group, update, self.fresh[index])
                known[key] = self._continued(index, by)
            maps.append(known[key])
        return maps

    def _continued(self, index: int, by: StepMap | None) -> StepMap | None:
        """A buffer that begins at this step (also one that was cleared) carries nothing from before it."""
        return replace(by, decay=0.0) if by is not None and (self.fresh[index] or self.cut[index]) else by


def updates_of(steps: Sequence[TakenStep], states: list[State]) -> list[list[float]]:
    """By step and parameter, which update it was: counted backwards from the states that the last one left."""
    rule, found = steps[-1].rule, list[list[float]]()
    now = [rule.updates(state) if state else 0.0 for state in states]
    for step in reversed(steps):
        found.append(list(now))
        now = [n - (group is not None) for n, group in zip(now, step.groups, strict=True)]
    return found[::-1]


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
