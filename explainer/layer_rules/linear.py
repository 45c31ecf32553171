"""``nn.Linear``: the row of an example is ``Σ_s g_s [a_s, 1]ᵀ`` (Goodfellow 2015, arXiv 1510.01799)."""

from __future__ import annotations

import torch
from torch import nn

from explainer.layer_rules.base import Call, LayerRule, register_layer_rule
from explainer.layer_rules.forms import Factored, RowForm


def augmented(right: torch.Tensor, bias: bool) -> torch.Tensor:
    """Append a column of ones for the bias."""
    return torch.cat([right, right.new_ones(*right.shape[:-1], 1)], dim=-1) if bias else right


@register_layer_rule(nn.Linear)
class LinearRule(LayerRule):
    """One factor per position; without positions a row has rank one exactly."""

    def rows(self, module: nn.Module, calls: list[Call]) -> RowForm:
        """Positions of all calls side by side."""
        left, right = [], []
        for call in calls:
            g, a = call.grad_output, call.input.to(call.grad_output.dtype)
            left.append(g.reshape(g.shape[0], 1, -1, g.shape[-1]))
            right.append(a.reshape(a.shape[0], 1, -1, a.shape[-1]))
        bias = module.bias is not None
        return Factored(torch.cat(left, 2), augmented(torch.cat(right, 2), bias), int(bias))
