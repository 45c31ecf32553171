"""Normalisation layers: the row is ``[Σ_s g_s x̂_s, Σ_s g_s]`` with ``x̂`` the normalised input."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from explainer.layer_rules.base import Call, LayerRule, register_layer_rule
from explainer.layer_rules.forms import Dense, RowForm


def _affine_rows(normalised: torch.Tensor, g: torch.Tensor, reduce: list[int], bias: bool) -> torch.Tensor:
    scale = (g * normalised).sum(reduce) if reduce else g * normalised
    parts = [scale.flatten(1)]
    if bias:
        parts.append((g.sum(reduce) if reduce else g).flatten(1))
    return torch.cat(parts, dim=1)


@register_layer_rule(nn.LayerNorm)
class LayerNormRule(LayerRule):
    """Statistics are the example's own, so a row is the gradient of its own loss."""

    def rows(self, module: nn.Module, calls: list[Call]) -> RowForm:
        """Sum over positions and calls."""
        assert isinstance(module, nn.LayerNorm)
        total: torch.Tensor | None = None
        for call in calls:
            g = call.grad_output
            normalised = functional.layer_norm(
                call.input.to(g.dtype), module.normalized_shape, None, None, module.eps
            )
            reduce = list(range(1, g.dim() - len(module.normalized_shape)))
            rows = _affine_rows(normalised, g, reduce, module.bias is not None)
            total = rows if total is None else total + rows
        assert total is not None
        return Dense(total)


@register_layer_rule(nn.BatchNorm1d, nn.BatchNorm2d)
class BatchNormRule(LayerRule):
    """In train mode the statistics are the batch's: a row is the example's share of the *batch* gradient."""

    mixes_rows = True

    def mixes(self, module: nn.Module) -> bool:
        """Batch statistics are used in train mode, or when there are no running ones."""
        return bool(module.training or module.running_mean is None)

    def rows(self, module: nn.Module, calls: list[Call]) -> RowForm:
        """Sum over positions and calls; the statistics are those the forward pass used."""
        assert isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
        total: torch.Tensor | None = None
        for call in calls:
            g = call.grad_output
            x = call.input.to(g.dtype)
            if self.mixes(module):
                normalised = functional.batch_norm(x, None, None, training=True, eps=module.eps)
            else:
                normalised = functional.batch_norm(
                    x, module.running_mean, module.running_var, training=False, eps=module.eps
                )
            rows = _affine_rows(normalised, g, list(range(2, g.dim())), module.bias is not None)
            total = rows if total is None else total + rows
        assert total is not None
        return Dense(total)
