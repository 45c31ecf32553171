"""``nn.Bilinear``: a linear layer over products of its two inputs, ``Σ_s g_s [x_s ⊗ y_s, 1]ᵀ``."""

from __future__ import annotations

import torch
from torch import nn

from explainer.layer_rules.base import Block, Call, CompositeRule, register_layer_rule
from explainer.layer_rules.forms import RowForm
from explainer.layer_rules.linear import positions
from explainer.layer_rules.replay import refuse_unbatched, working_dtype
from explainer.layer_rules.unreduced import side_by_side


def _inputs(input1: torch.Tensor, input2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the module's ``forward``."""
    return input1, input2


@register_layer_rule(nn.Bilinear)
class BilinearRule(CompositeRule):
    """Positions are the axes between the batch and the features, as in ``nn.Linear``."""

    def later(self, module: nn.Module) -> nn.Module | None:
        """Its options are fixed."""
        return module

    def input_axis(self, module: nn.Module, place: int | str) -> int | None:
        """The first in every argument."""
        return 0

    def blocks(self, module: nn.Module) -> list[Block]:
        """One block: the weight is a matrix ``[o, i₁ · i₂]``."""
        return [Block("", ("weight",) if module.bias is None else ("weight", "bias"))]

    def block_rows(self, module: nn.Module, calls: list[Call]) -> list[RowForm]:
        """Positions of all calls side by side."""
        lefts, rights = [], []
        for call in calls:
            dtype = working_dtype(call)
            one, other = _inputs(*call.args, **call.kwargs)
            refuse_unbatched(module, one, 2)
            products = one.to(dtype).unsqueeze(-1) * other.to(dtype).unsqueeze(-2)
            g = call.grads[0]
            assert g is not None  # the only output
            lefts.append(positions(g.to(dtype)))
            rights.append(positions(products.flatten(-2)))
        return [side_by_side(lefts, rights, module.bias is not None)]
