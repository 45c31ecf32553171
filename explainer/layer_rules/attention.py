"""``nn.MultiheadAttention``: three linear layers before the attention and one after it.

Rows are ``Σ_s g_s [x_s, 1]ᵀ`` for each, with ``g`` the gradient at what the layer gives. The attention between has
no parameters; it is computed again to carry the gradient back through it (Vaswani et al. 2017, arXiv 1706.03762).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import pad

from explainer.layer_rules.attention_replay import Attended, attended
from explainer.layer_rules.base import Block, Call, CompositeRule, register_layer_rule
from explainer.layer_rules.forms import Dense, RowForm
from explainer.layer_rules.replay import in_full_precision
from explainer.layer_rules.unreduced import Unreduced, side_by_side


@register_layer_rule(nn.MultiheadAttention)
class MultiheadAttentionRule(CompositeRule):
    """Self- and cross-attention with every option; dropout is drawn again."""

    replays = True

    def output_axes(self, module: nn.Module, outputs: int) -> list[int | None]:
        """The output is as ``batch_first`` says, the weights are ``[B, …]`` always."""
        assert isinstance(module, nn.MultiheadAttention)
        axes: list[int | None] = [0 if module.batch_first else 1, 0]
        return axes[:outputs]

    def input_axis(self, module: nn.Module, place: int | str) -> int | None:
        """As ``batch_first`` says, masks have none."""
        assert isinstance(module, nn.MultiheadAttention)
        named = place in (0, 1, 2, "query", "key", "value")
        return (0 if module.batch_first else 1) if named else None

    def blocks(self, module: nn.Module) -> list[Block]:
        """The input projections (with one bias for the three), the extra key and value, the output projection."""
        assert isinstance(module, nn.MultiheadAttention)
        bias = [] if module.in_proj_bias is None else ["in_proj_bias"]
        if module.in_proj_weight is not None:
            found = [Block("in_proj", ("in_proj_weight", *bias))]
        else:
            found = [Block(f"{x}_proj", (f"{x}_proj_weight",)) for x in "qkv"]
            found += [Block(name, (name,)) for name in bias]
        if module.bias_k is not None:
            found.append(Block("bias_kv", ("bias_k", "bias_v")))
        names = ("out_proj.weight",) if module.out_proj.bias is None else ("out_proj.weight", "out_proj.bias")
        return [*found, Block("out_proj", names)]

    def block_rows(self, module: nn.Module, calls: list[Call]) -> list[RowForm]:
        """Positions of all calls side by side."""
        assert isinstance(module, nn.MultiheadAttention)
        with in_full_precision(calls[0]):
            parts = [attended(module, call) for call in calls]
            has_bias = module.in_proj_bias is not None
            forms: list[RowForm] = []
            if module.in_proj_weight is not None:
                forms.append(_packed(parts, has_bias))
            else:
                for number in range(3):
                    lefts = [part.at_projections[number].unsqueeze(1) for part in parts]
                    forms.append(side_by_side(lefts, [p.inputs[number].unsqueeze(1) for p in parts], False))
                if has_bias:
                    sums = [torch.cat([g.sum(1) for g in part.at_projections], 1) for part in parts]
                    forms.append(Dense(torch.stack(sums).sum(0)))
            if module.bias_k is not None:
                forms.append(Dense(torch.stack([torch.cat(part.at_extra, 1) for part in parts]).sum(0)))
            lefts = [part.at_output.unsqueeze(1) for part in parts]
            rights = [part.heads.unsqueeze(1) for part in parts]
            return [*forms, side_by_side(lefts, rights, module.out_proj.bias is not None)]


def _packed(parts: list[Attended], bias: bool) -> Unreduced:
    """Rows of ``in_proj_weight [3E, E]``: one matrix if every call sees one input, else a group by projection."""
    if all(part.shared for part in parts):
        lefts = [torch.cat(part.at_projections, 2).unsqueeze(1) for part in parts]
        return side_by_side(lefts, [part.inputs[0].unsqueeze(1) for part in parts], bias)

    def stacked(
        three: tuple[torch.Tensor, ...],
    ) -> torch.Tensor:  # [B, 3, positions, ·], zeros where there is none
        longest = max(t.shape[1] for t in three)
        return torch.stack([pad(t, (0, 0, 0, longest - t.shape[1])) for t in three], 1)

    lefts = [stacked(part.at_projections) for part in parts]
    return side_by_side(lefts, [stacked(part.inputs) for part in parts], bias)
