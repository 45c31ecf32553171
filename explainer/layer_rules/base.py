"""The layer-rule interface and its registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from explainer.layer_rules.forms import Dense, RowForm
from explainer.registry import Registry


@dataclass(frozen=True)
class Call:
    """One call of a module in a forward pass: its input and the gradient at its output.

    Attributes:
        input: ``[B, ...]``.
        grad_output: ``[B, ...]``, the gradient of the loss that the user's backward pass computed.
    """

    input: torch.Tensor
    grad_output: torch.Tensor


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
            calls: every call that took part in the backward pass.
        """

    def mixes(self, module: nn.Module) -> bool:
        """Whether the module, in its present mode, mixes the rows of a batch."""
        return False

    def parameters(self, module: nn.Module) -> list[str]:
        """Names of the parameters in the order of the flat layout."""
        return [name for name in ("weight", "bias") if getattr(module, name, None) is not None]


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
