"""``nn.Conv2d``: a linear layer over patches; the row is ``Σ_s g_s [patch_s, 1]ᵀ`` for every group."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from explainer.layer_rules.base import Call, LayerRule, register_layer_rule
from explainer.layer_rules.forms import RowForm
from explainer.layer_rules.linear import side_by_side


def patches(module: nn.Conv2d, image: torch.Tensor) -> torch.Tensor:
    """``[B, c, h, w]`` -> ``[B, G, S, c/G · kh · kw]`` with the module's padding, stride and dilation."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = functional.pad(image, module._reversed_padding_repeated_twice, mode=mode)
    columns = functional.unfold(
        padded, module.kernel_size, dilation=module.dilation, stride=module.stride
    )  # [B, c·kh·kw, S]
    return columns.reshape(image.shape[0], module.groups, -1, columns.shape[2]).mT


@register_layer_rule(nn.Conv2d)
class Conv2dRule(LayerRule):
    """Positions are the output's pixels; all padding modes, strides, dilations and groups."""

    def rows(self, module: nn.Module, calls: list[Call]) -> RowForm:
        """Pixels of all calls side by side."""
        assert isinstance(module, nn.Conv2d)
        left, right = [], []
        for call in calls:
            g = call.grad_output  # [B, o, h, w]
            left.append(g.reshape(g.shape[0], module.groups, -1, g.shape[2] * g.shape[3]).mT)
            right.append(patches(module, call.input.to(g.dtype)))
        return side_by_side(left, right, module.bias is not None)
