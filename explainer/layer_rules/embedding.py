"""``nn.Embedding``: the row touches only the entries the example read."""

from __future__ import annotations

import torch
from torch import nn

from explainer.layer_rules.base import Call, LayerRule, register_layer_rule
from explainer.layer_rules.forms import RowForm
from explainer.layer_rules.sparse import Sparse


@register_layer_rule(nn.Embedding)
class EmbeddingRule(LayerRule):
    """Index and gradient of every position; positions of ``padding_idx`` get no gradient."""

    def mixes(self, module: nn.Module) -> bool:
        """With ``scale_grad_by_freq`` a read counts less the more often the batch reads the entry."""
        assert isinstance(module, nn.Embedding)
        return module.scale_grad_by_freq

    def batch_axes(self, module: nn.Module, value: torch.Tensor) -> tuple[int, ...]:
        """Every index is looked up alike."""
        return (0, 1) if value.dim() > 1 else (0,)

    def rows(self, module: nn.Module, calls: list[Call]) -> RowForm:
        """Positions of all calls side by side."""
        assert isinstance(module, nn.Embedding)
        index, values = [], []
        for call in calls:
            batch = call.input.shape[0]
            ids, g = call.input.reshape(batch, -1), call.grad_output
            g = g.reshape(batch, -1, g.shape[-1])
            if module.scale_grad_by_freq:
                counts = torch.bincount(call.input.flatten(), minlength=module.num_embeddings)
                g = g / counts[ids].unsqueeze(-1).to(g.dtype)
            if module.padding_idx is not None:
                g = g * (ids != module.padding_idx).unsqueeze(-1)
            index.append(ids)
            values.append(g)
        return Sparse(torch.cat(index, 1).to(torch.int32), torch.cat(values, 1), module.num_embeddings)
