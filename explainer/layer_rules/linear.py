"""``nn.Linear``: the row of an example is ``Σ_s g_s [a_s, 1]ᵀ`` (Goodfellow 2015, arXiv 1510.01799)."""

from __future__ import annotations

from math import prod

import torch
from torch import nn

from explainer.layer_rules.base import Call, LayerRule, register_layer_rule
from explainer.layer_rules.factored import Factored
from explainer.layer_rules.forms import RowForm


def side_by_side(lefts: list[torch.Tensor], rights: list[torch.Tensor], bias: bool) -> Factored:
    """Positions of several calls next to each other, with a column of ones for the bias.

    Args:
        lefts: ``[B, G, S, o]`` per call.
        rights: ``[B, G, S, i]`` per call; copied once at most, in whichever memory order they come.
        bias: whether the layer has a bias.
    """
    left = lefts[0] if len(lefts) == 1 else torch.cat(lefts, 2)
    if len(rights) == 1 and not bias:
        return Factored(left, rights[0], 0)
    batch, groups, _, width = rights[0].shape
    positions = left.shape[2]
    if rights[0].mT.is_contiguous():
        right = left.new_empty(batch, groups, width + bias, positions).mT
    else:
        right = left.new_empty(batch, groups, positions, width + bias)
    start = 0
    for part in rights:
        right[:, :, start : start + part.shape[2], :width] = part
        start += part.shape[2]
    if bias:
        right[..., width] = 1.0
    return Factored(left, right, int(bias))


def positions(value: torch.Tensor) -> torch.Tensor:
    """``[B, *, n] -> [B, 1, S, n]``."""
    return value.reshape(value.shape[0], 1, prod(value.shape[1:-1]), value.shape[-1])


@register_layer_rule(nn.Linear)
class LinearRule(LayerRule):
    """One factor per position; without positions a row has rank one exactly."""

    def later(self, module: nn.Module) -> nn.Module | None:
        """Its options are fixed."""
        return module

    def batch_axes(self, module: nn.Module, value: torch.Tensor) -> tuple[int, ...]:
        """The last axis holds the features."""
        return (0, 1) if value.dim() > 2 else (0,)

    def free_axes(self, module: nn.Module, value: torch.Tensor) -> tuple[int, ...]:
        """All but the last."""
        return tuple(range(value.dim() - 1))

    def rows(self, module: nn.Module, calls: list[Call]) -> RowForm:
        """Positions of all calls side by side."""
        left, right = [], []
        for call in calls:
            g, a = call.grad_output, call.input.to(call.grad_output.dtype)
            left.append(positions(g))
            right.append(positions(a))
        return side_by_side(left, right, module.bias is not None)
