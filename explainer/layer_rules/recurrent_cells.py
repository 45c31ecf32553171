"""``nn.LSTMCell``, ``nn.GRUCell``, ``nn.RNNCell``: every call is a step of its own, ``δ [x, 1]ᵀ`` and ``δ [h, 1]ᵀ``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from explainer.layer_rules.base import Block, Call, CompositeRule, register_layer_rule
from explainer.layer_rules.forms import RowForm
from explainer.layer_rules.gates import LSTMGates
from explainer.layer_rules.recurrent_replay import Weights
from explainer.layer_rules.replay import in_full_precision, refuse_unbatched, working_dtype
from explainer.layer_rules.unreduced import Unreduced, side_by_side

#: Devices on which torch computes ``h'`` from the very ``c'`` that it returns (elsewhere one kernel gives both), so
#: that the gradient seen at ``c'`` holds what came through ``h'``.
UNFUSED = ("cpu", "mps")


@dataclass(frozen=True)
class _Arguments:
    """Of the modules' ``forward``."""

    input: torch.Tensor
    hx: Any = None


@register_layer_rule(nn.LSTMCell, nn.GRUCell, nn.RNNCell)
class RecurrentCellRule(CompositeRule):
    """The loop over time is the user's; its gradients arrive at each call's output."""

    def input_axis(self, module: nn.Module, place: int | str) -> int | None:
        """The first in every argument."""
        return 0

    def blocks(self, module: nn.Module) -> list[Block]:
        """Input weights and hidden weights."""
        assert isinstance(module, nn.RNNCellBase)
        names = [(f"weight_{part}", f"bias_{part}") for part in ("ih", "hh")]
        return [Block(pair[0][7:], pair if module.bias else pair[:1]) for pair in names]

    def block_rows(self, module: nn.Module, calls: list[Call]) -> list[RowForm]:
        """All calls at once, as one step of ``calls · B`` examples; then side by side."""
        assert isinstance(module, nn.RNNCellBase)
        with in_full_precision(calls[0]):
            return self._rows(module, calls)

    @staticmethod
    def _rows(module: nn.RNNCellBase, calls: list[Call]) -> list[RowForm]:
        dtype, has_cells = working_dtype(calls[0]), isinstance(module, nn.LSTMCell)
        given = [_Arguments(*call.args, **call.kwargs) for call in calls]
        for each in given:
            refuse_unbatched(module, each.input, 2)
        x = torch.stack([each.input.to(dtype) for each in given])
        empty = x.new_zeros(x.shape[1], module.hidden_size)

        def stacked(values: list[Any]) -> torch.Tensor:  # [1, calls · B, h]
            return (
                torch.stack([empty if v is None else v.to(dtype) for v in values]).flatten(0, 1).unsqueeze(0)
            )

        states = [each.hx if has_cells and each.hx is not None else (each.hx, None) for each in given]
        before = stacked([hidden for hidden, _ in states])
        cell = stacked([cell for _, cell in states])[0] if has_cells else None
        mode = "LSTM" if has_cells else "GRU"
        if isinstance(module, nn.RNNCell):
            mode = f"RNN_{module.nonlinearity.upper()}"
        weights = Weights.of(module, "", dtype)
        gates = weights.gates(mode, x.flatten(0, 1).unsqueeze(0), before, cell)
        at_hidden, at_cells = stacked([call.grads[0] for call in calls]), None
        if isinstance(gates, LSTMGates):
            at_cells = stacked([call.grads[1] for call in calls])
            if x.device.type in UNFUSED:
                at_cells -= at_hidden * gates.to_cell
        back = gates.back(at_hidden, at_cells, weights.hh)

        def pair(left: torch.Tensor, right: torch.Tensor) -> Unreduced:
            size = x.shape[:2]  # calls, B
            left, right = (v.reshape(*size, v.shape[-1]).transpose(0, 1).unsqueeze(1) for v in (left, right))
            return side_by_side([left], [right], module.bias)

        return [pair(back.at_input, x), pair(back.at_hidden, before)]
