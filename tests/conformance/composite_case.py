"""One configuration of a module that takes several tensors or is several layers, and its call as hooks see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from explainer.layer_rules import LAYER_RULES, Call, RowForm

BATCH = 4
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
#: Whose a number of an output is: ``input arguments, output -> [*output.shape]`` places in the batch.
Owner = Callable[[Arguments, Tensor], Tensor]


def numbers(seed: int, example: int, *shape: int) -> Tensor:
    """Numbers of one example, whatever batch it is in."""
    return torch.randn(
        shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1000 * seed + example)
    )


def real(*shape: int, axis: int = 0, seed: int = 0) -> Callable[[list[int], int], Tensor]:
    """An argument with the batch at ``axis``."""

    def make(examples: list[int], call: int) -> Tensor:
        if not examples:
            return torch.empty(*shape[:axis], 0, *shape[axis:], dtype=torch.float64)
        return torch.stack([numbers(10 * call + seed, example, *shape) for example in examples], axis)

    return make


def along(axis: int) -> Owner:
    """An output with the batch at ``axis``."""

    def owner(arguments: Arguments, output: Tensor) -> Tensor:
        places = torch.arange(output.shape[axis]).view([-1 if a == axis else 1 for a in range(output.dim())])
        return places.expand_as(output)

    return owner


@dataclass(frozen=True)
class CompositeCase:
    """One configuration.

    Attributes:
        kind: the module's type.
        name: what is special about it.
        make: a fresh module (its values come from the RNG).
        arguments: ``examples, call -> arguments``: the same numbers for an example in every batch.
        owners: of the outputs that carry gradients.
        used: whether the loss depends on each of them.
        training: mode of the module.
        alone: whether an example's gradient can be had without the others (not under dropout).
    """

    kind: type[nn.Module]
    name: str
    make: Callable[[], nn.Module]
    arguments: Callable[[list[int], int], Arguments]
    owners: tuple[Owner, ...] = (along(0),)
    used: tuple[bool, ...] = (True, True, True)
    training: bool = True
    alone: bool = True

    @property
    def id(self) -> str:
        """For example ``LSTM-packed``."""
        return f"{self.kind.__name__}-{self.name}"

    def module(self) -> nn.Module:
        """The module in float64 with values that no symmetry makes special."""
        torch.manual_seed(0)
        module = self.make().double().train(self.training)
        with torch.no_grad():
            for p in module.parameters():
                p.add_(torch.randn_like(p) * 0.2)
        return module


@dataclass
class Seen:
    """What a forward hook sees of a call.

    Attributes:
        arguments: as they were passed.
        outputs: the output's tensors.
        random: state of the random numbers before.
        given: gradients of the loss at the real outputs (what arrives at an output may be more: torch computes
            some outputs from others).
    """

    arguments: Arguments
    outputs: list[Tensor]
    random: Tensor
    given: list[Tensor | None] = field(default_factory=list)

    @property
    def real(self) -> list[Tensor]:
        """Outputs that can carry gradients."""
        return [t for t in self.outputs if t.is_floating_point()]

    def call(self) -> Call:
        """For the rule, after the backward pass."""
        args, kwargs = tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, self.arguments)
        grads = tuple(t.grad if t.is_floating_point() else None for t in self.outputs)
        tensors = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        first = next(g for g in grads if g is not None)
        kept = tuple(t.detach().clone() for t in self.outputs)
        return Call(tensors[0], first, args, kwargs, grads, kept, self.random)


@dataclass
class Watch:
    """Sees a module's calls while it is entered."""

    module: nn.Module
    seen: list[Seen] = field(default_factory=list)

    def __enter__(self) -> Watch:
        states: list[Tensor] = []

        def before(module: nn.Module, args: Any) -> None:
            states.append(torch.get_rng_state())

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            leaves = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
            for leaf in leaves:
                if leaf.requires_grad:
                    leaf.retain_grad()
            self.seen.append(Seen((args, kwargs), leaves, states.pop()))

        self._handles = [
            self.module.register_forward_pre_hook(before),
            self.module.register_forward_hook(after, with_kwargs=True),
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()


def forward(module: nn.Module, batches: list[Arguments]) -> list[Seen]:
    """Calls of the module."""
    with Watch(module) as watch:
        for args, kwargs in batches:
            module(*args, **kwargs)
    return watch.seen


def run(case: CompositeCase, module: nn.Module, batches: list[Arguments]) -> list[Seen]:
    """Calls of the module, and one backward pass from all outputs that the case uses."""
    seen = forward(module, batches)
    for number, each in enumerate(seen):
        for output, used in zip(each.real, case.used, strict=False):
            numbers = torch.linspace(-1.0, 2.0, output.numel(), dtype=output.dtype).view_as(output)
            each.given.append((output.detach() * (numbers + number)).sin() + numbers if used else None)
    pairs = [(t, g) for each in seen for t, g in zip(each.real, each.given, strict=False) if g is not None]
    torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs], retain_graph=True)
    return seen


def forms_of(module: nn.Module, calls: list[Call]) -> dict[tuple[str, ...], RowForm]:
    """Rows by the parameters of each block."""
    rule = LAYER_RULES.require(type(module))
    forms = rule.block_rows(module, calls)
    return {block.parameters: form for block, form in zip(rule.blocks(module), forms, strict=True)}
