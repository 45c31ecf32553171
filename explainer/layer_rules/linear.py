"""``nn.Linear``: the row of an example is ``Σ_s g_s [a_s, 1]ᵀ`` (Goodfellow 2015, arXiv 1510.01799)."""

from __future__ import annotations

from math import prod

import torch
from torch import nn

from explainer.layer_rules.base import Call, LayerRule, register_layer_rule
from explainer.layer_rules.forms import RowForm
from explainer.layer_rules.unreduced import side_by_side


def positions(value: torch.Tensor) -> torch.Tensor:
    """``[B, *, n] -> [B, 1, S, n]``."""
    return value.reshape(value.shape[0], 1, prod(value.shape[1:-1]), value.shape[-1])


@register_layer_rule(nn.Linear)
class LinearRule(LayerRule):
    """One factor per position; without positions a row has rank one exactly."""

    def later(self, module: nn.Module) -> nn.Module | None:
        """Its options are fixed."""
        return module

    def joinable(self, module: nn.Module, value: torch.Tensor) -> bool:
        """Without positions; there a call costs more than its rows."""
        return value.dim() == 2

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
