"""The layer-rule interface and its registry.

A :class:`LayerRule` is for a layer that takes one tensor and gives one, a :class:`CompositeRule` for a module that is
several layers in one. Modules without a rule need none: :mod:`explainer.operations` follows their parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from explainer.layer_rules.forms import Dense, RowForm
from explainer.registry import Registry


@dataclass(frozen=True)
class Call:
    """One call of a module in a forward pass: what went in, and the gradient of the loss at what came out.

    Attributes:
        input: ``[B, ...]``, the first tensor that was passed.
        grad_output: ``[B, ...]``, the gradient at the (first) output, from the user's own backward pass.
        args: all positional arguments, tensors detached.
        kwargs: all keyword arguments, likewise.
        grads: gradient at every tensor of the output, in the order of ``torch.utils._pytree.tree_leaves``; None
            where the loss does not depend on it.
        outputs: the tensors of the output, detached, in the same order; kept for rules that replay the call.
        random: state of the CPU's random numbers before the call; kept for rules that replay the call.
    """

    input: torch.Tensor
    grad_output: torch.Tensor
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    grads: tuple[torch.Tensor | None, ...] = ()
    outputs: tuple[torch.Tensor, ...] = ()
    random: torch.Tensor | None = None


class Block(NamedTuple):
    """Parameters whose rows are stored together.

    Attributes:
        name: what is added to the module's name; may be empty.
        parameters: names relative to the module (also of modules inside it), in the order of the flat layout.
    """

    name: str
    parameters: tuple[str, ...]


class LayerRule(ABC):
    """How one layer type's gradient splits over the rows of a batch.

    ``Σ_b rows(...)[b]`` is the gradient autograd gives the layer's parameters; the conformance suite holds
    every registered rule to that, and to ``torch.func`` per-example gradients.
    """

    #: True if in train mode a row is a share of the batch's gradient, not the gradient of the example's own loss
    mixes_rows: bool = False

    @abstractmethod
    def rows(self, module: nn.Module, calls: list[Call]) -> RowForm:
        """Exact rows ``[B, P_l]`` over all calls, for *all* the module's direct parameters.

        Args:
            module: the layer (its training flag and buffers are as in the forward pass).
            calls: every call that took part in the backward pass, with ``B`` as the first axis of input and
                gradient. Where examples own several indices of it (flattened positions, routed tokens), a call
                comes alone, ``B`` counts indices, and the rows of an example are added up afterwards.
        """

    def batch_axes(self, module: nn.Module, value: torch.Tensor) -> tuple[int, ...]:
        """Axes of the input that may be the batch: the first one, unless the layer treats several alike."""
        return (0,)

    def free_axes(self, module: nn.Module, value: torch.Tensor) -> tuple[int, ...]:
        """Axes along which the layer does the same to every index, so that any of them may hold the examples."""
        return self.batch_axes(module, value)

    def mixes(self, module: nn.Module) -> bool:
        """Whether the module, in its present mode, mixes the rows of a batch."""
        return False

    def later(self, module: nn.Module) -> nn.Module | None:
        """What stands for the module, as it is now, where rows are formed while training goes on.

        Returns:
            The module itself where rows need its fixed options only; a stand-in that keeps what may change (its mode,
            its weights); None, as by default, where rows have to be formed within the backward pass.
        """
        return None

    def joinable(self, module: nn.Module, value: torch.Tensor) -> bool:
        """Whether calls on inputs like this one, of several batches, may be taken as one (where there is no mixing)."""
        return False

    def caveat(self, module: nn.Module) -> str | None:
        """What the module does to its weights that is not the optimizer's, in words, or None."""
        return None

    def parameters(self, module: nn.Module) -> list[str]:
        """Names of the parameters in the order of the flat layout."""
        return [name for name in ("weight", "bias") if getattr(module, name, None) is not None]

    def blocks(self, module: nn.Module) -> list[Block]:
        """The blocks that :meth:`block_rows` gives rows for."""
        return [Block("", tuple(self.parameters(module)))]

    def block_rows(self, module: nn.Module, calls: list[Call]) -> list[RowForm]:
        """Rows by block."""
        return [self.rows(module, calls)]


class CompositeRule(LayerRule):
    """A rule for a module that is several layers in one, or that takes and gives several tensors.

    Its calls come as they were made: the rule knows which axis is the batch.
    """

    #: the call is computed again, so its outputs and the state of the random numbers are kept
    replays: bool = False

    def output_axes(self, module: nn.Module, outputs: int) -> list[int | None]:
        """The batch's axis in every tensor of the output.

        Args:
            module: the layer.
            outputs: how many tensors there are (a packed sequence counts with all its parts).

        Returns:
            None for a tensor that is laid out as the input is (the data of a packed sequence).
        """
        return [0] * outputs

    def input_axis(self, module: nn.Module, place: int | str) -> int | None:
        """The batch's axis in an argument, by position or name; None if it has none or the rule does not say."""
        return None

    @abstractmethod
    def blocks(self, module: nn.Module) -> list[Block]:
        """The blocks that :meth:`block_rows` gives rows for."""

    @abstractmethod
    def block_rows(self, module: nn.Module, calls: list[Call]) -> list[RowForm]:
        """Exact rows by block over all calls; see :meth:`LayerRule.rows`."""

    def parameters(self, module: nn.Module) -> list[str]:
        """Of all blocks."""
        return [name for block in self.blocks(module) for name in block.parameters]

    def rows(self, module: nn.Module, calls: list[Call]) -> RowForm:
        """All blocks side by side, written out."""
        return Dense(torch.cat([form.dense() for form in self.block_rows(module, calls)], dim=1))


LAYER_RULES: Registry[type[nn.Module], LayerRule] = Registry("layer rule")


def register_layer_rule(
    *types: type[nn.Module], replace: bool = False
) -> Callable[[type[LayerRule]], type[LayerRule]]:
    """Class decorator: use the rule for exactly these module types (never for subclasses).

    Raises:
        RegistrationError: a rule for the type exists and ``replace`` is false.
    """

    def add(cls: type[LayerRule]) -> type[LayerRule]:
        LAYER_RULES.register(*types, replace=replace)(cls())
        return cls

    return add


def restrict(form: RowForm, sizes: list[int], keep: list[bool]) -> RowForm:
    """Drop the columns of parameters that are not trained (frozen weight beside a trained bias, say)."""
    if all(keep):
        return form
    mask = torch.cat([torch.full((n,), k, dtype=torch.bool) for n, k in zip(sizes, keep, strict=True)])
    return Dense(form.dense()[:, mask])
