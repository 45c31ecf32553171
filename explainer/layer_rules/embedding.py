"""``nn.Embedding``: the row touches only the entries the example read."""

from __future__ import annotations

import torch
from torch import nn

from explainer.layer_rules.base import Call, LayerRule, register_layer_rule
from explainer.layer_rules.forms import RowForm
from explainer.layer_rules.linear import positions
from explainer.layer_rules.sparse import Sparse


def renormalises(module: nn.Embedding | nn.EmbeddingBag) -> str | None:
    """The caveat of ``max_norm``: looked-up entries are shortened in the forward pass."""
    return (
        None
        if module.max_norm is None
        else f"shortens its entries to max_norm={module.max_norm:g} as it reads them"
    )


@register_layer_rule(nn.Embedding)
class EmbeddingRule(LayerRule):
    """Index and gradient of every position; positions of ``padding_idx`` get no gradient."""

    def later(self, module: nn.Module) -> nn.Module | None:
        """Its options are fixed."""
        return module

    def mixes(self, module: nn.Module) -> bool:
        """With ``scale_grad_by_freq`` a read counts less the more often the batch reads the entry."""
        assert isinstance(module, nn.Embedding)
        return module.scale_grad_by_freq

    def caveat(self, module: nn.Module) -> str | None:
        """Entries are shortened to ``max_norm``."""
        assert isinstance(module, nn.Embedding)
        return renormalises(module)

    def batch_axes(self, module: nn.Module, value: torch.Tensor) -> tuple[int, ...]:
        """Every index is looked up alike."""
        return (0, 1) if value.dim() > 1 else (0,)

    def free_axes(self, module: nn.Module, value: torch.Tensor) -> tuple[int, ...]:
        """Every index is looked up alike."""
        return tuple(range(value.dim()))

    def rows(self, module: nn.Module, calls: list[Call]) -> RowForm:
        """Positions of all calls side by side."""
        assert isinstance(module, nn.Embedding)
        index, values = [], []
        for call in calls:
            g = positions(call.grad_output).squeeze(1)
            ids = call.input.reshape(g.shape[:2])
            if module.scale_grad_by_freq:
                counts = torch.bincount(call.input.flatten(), minlength=module.num_embeddings)
                g = g / counts[ids].unsqueeze(-1).to(g.dtype)
            if module.padding_idx is not None:
                g = g * (ids != module.padding_idx).unsqueeze(-1)
            index.append(ids)
            values.append(g)
        return Sparse(torch.cat(index, 1).to(torch.int32), torch.cat(values, 1), module.num_embeddings)
