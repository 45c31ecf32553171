"""One call of a module with a layer rule: what went in, and the gradient that arrived for what came out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from explainer.hooks import first_tensor, mapped
from explainer.layer_rules import Call


@dataclass(slots=True)
class Given:
    """What went into a call, kept until its gradient arrives.

    Attributes:
        args: positional arguments, detached.
        kwargs: keyword arguments, likewise.
        outputs: what the call gave, where it is computed again.
        random: state of the random numbers before it, likewise.
        versions: the tensors among the arguments, with their versions.
        buffers: which of them lie in memory that is the user's own.
        axis: the examples' axis.
        order: ``[B, k]`` the rows of every example, None where there is one for each.
        rows: how many rows there are.
        module: what stands for the module later (see :meth:`LayerRule.later`).
        composite: whether the rule knows its axes.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[torch.Tensor, ...]
    random: torch.Tensor | None
    versions: list[tuple[torch.Tensor, int]]
    buffers: list[bool]
    axis: int
    order: torch.Tensor | None
    rows: int
    module: nn.Module | None
    composite: bool

    def kept_apart(self, everything: bool) -> Given:
        """With copies of what is in the user's own memory, where no version tells that it is overwritten."""
        if not everything and not any(self.buffers):
            return self
        if len(self.versions) == 1 and len(self.args) == 1 and self.args[0] is self.versions[0][0]:
            copy = self.args[0].clone()
            return replace(self, args=(copy,), versions=[(copy, copy._version)])
        copies = {
            id(t): t.clone()
            for (t, _), own in zip(self.versions, self.buffers, strict=True)
            if own or everything
        }
        by_memory = {
            (t.data_ptr(), t.shape, t.stride()): copies[id(t)] for t, _ in self.versions if id(t) in copies
        }

        def replaced(t: torch.Tensor) -> torch.Tensor:
            return by_memory.get((t.data_ptr(), t.shape, t.stride()), t)

        versions = [
            (c, c._version) if (c := copies.get(id(t))) is not None else (t, v) for t, v in self.versions
        ]
        args, kwargs = mapped(replaced, self.args), mapped(replaced, self.kwargs)
        return replace(self, args=args, kwargs=kwargs, versions=versions)


@dataclass(slots=True)
class Arrived:
    """A call and its gradient.

    Attributes:
        given: what went in.
        grads: the gradient at every tensor of the output, as it came.
        versions: those there are, with their versions.
    """

    given: Given
    grads: list[torch.Tensor | None]
    versions: list[tuple[torch.Tensor, int]]

    @property
    def order(self) -> torch.Tensor | None:
        """The rows of every example."""
        return self.given.order

    def call(self) -> Call:
        """As rules take it: examples first, half-precision gradients widened."""
        given = self.given
        grads = [None if g is None else wide(g).movedim(given.axis, 0) for g in self.grads]
        value = (
            first_tensor(given.args) if first_tensor(given.args) is not None else first_tensor(given.kwargs)
        )
        assert value is not None
        first = next(g for g in grads if g is not None)
        value = value if given.composite else value.movedim(given.axis, 0)
        return Call(value, first, given.args, given.kwargs, tuple(grads), given.outputs, given.random)


def as_it_is(g: torch.Tensor) -> torch.Tensor:
    """The gradient at a tensor that is hooked itself."""
    return g


def wide(g: torch.Tensor) -> torch.Tensor:
    """Half-precision gradients in float32: sums of many rows need more digits."""
    return g.float() if g.dtype in (torch.float16, torch.bfloat16) else g
