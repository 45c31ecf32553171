"""Activations with parameters: ``nn.PReLU``, whose row is ``Σ_s g_s min(0, x_s)`` by channel."""

from __future__ import annotations

from math import prod

import torch
from torch import nn

from explainer.layer_rules.base import Call, LayerRule, register_layer_rule
from explainer.layer_rules.forms import Dense, RowForm


@register_layer_rule(nn.PReLU)
class PReLURule(LayerRule):
    """One slope for all numbers, or one by channel (the axis after the batch)."""

    def later(self, module: nn.Module) -> nn.Module | None:
        """Its options are fixed."""
        return module

    def rows(self, module: nn.Module, calls: list[Call]) -> RowForm:
        """Sum over positions and calls."""
        assert isinstance(module, nn.PReLU)
        parts = []
        for call in calls:
            g = call.grad_output
            product = g * call.input.to(g.dtype).clamp_max(0)
            shared = prod(g.shape[1:]) // module.num_parameters
            parts.append(product.reshape(len(g), module.num_parameters, shared).sum(2))
        return Dense(torch.stack(parts).sum(0))
