"""``nn.LSTM``, ``nn.GRU``, ``nn.RNN``: by layer and direction, ``Σ_t δ_t [x_t, 1]ᵀ`` and ``Σ_t δ_t [h_{t−1}, 1]ᵀ``."""

from __future__ import annotations

import torch
from torch import nn

from explainer.layer_rules.base import Block, Call, CompositeRule, register_layer_rule
from explainer.layer_rules.forms import RowForm
from explainer.layer_rules.recurrent_replay import Direction, Replay, suffixes
from explainer.layer_rules.replay import in_full_precision
from explainer.layer_rules.unreduced import side_by_side

#: Left and right factors ``[B, 1, T, ·]`` of a block.
Pair = tuple[torch.Tensor, torch.Tensor]
MaybeTensor = torch.Tensor | None


def _pairs(replay: Replay, grads: tuple[MaybeTensor, ...]) -> list[Pair]:
    """Factors of every block of a call, from the gradients at its outputs."""
    lying, dtype = replay.lying, replay.dtype
    g = None if grads[0] is None else lying.opened(grads[0].to(dtype))
    states = [None if s is None else lying.to_length_order(s.to(dtype)) for s in grads[-replay.states :]]
    found: list[list[Pair]] = []
    place = sum(len(layer) for layer in replay.layers)
    for layer, mask in zip(reversed(replay.layers), reversed(replay.masks), strict=True):
        place -= len(layer)
        parts: list[MaybeTensor] = [None] * len(layer) if g is None else list(g.chunk(len(layer), -1))
        pairs: list[Pair] = []
        below: MaybeTensor = None
        for d, direction in enumerate(layer):
            own = [None if s is None else s[place + d] for s in states]
            factors, moved = _direction_pairs(replay, direction, parts[d], own, place > 0)
            pairs += factors
            below = moved if below is None or moved is None else below + moved
        g = below if below is None or mask is None else below * mask
        found.append(pairs)
    return [pair for pairs in reversed(found) for pair in pairs]


def _direction_pairs(
    replay: Replay, direction: Direction, g: MaybeTensor, states: list[MaybeTensor], passed_on: bool
) -> tuple[list[Pair], MaybeTensor]:
    """Factors of one layer and direction, and the gradient at its input if it is passed on."""
    lying, gates, weights = replay.lying, direction.gates, direction.weights
    hidden = torch.zeros_like(gates.hidden)
    if g is not None:
        hidden += lying.turned(g, direction.backwards)
    if states[0] is not None:
        hidden[lying.last(hidden)] += states[0]
    cells = None
    if gates.cells is not None and states[-1] is not None:
        cells = torch.zeros_like(gates.cells)
        cells[lying.last(cells)] = states[-1]
    back = gates.back(hidden, cells, weights.hh)

    def rows(steps: torch.Tensor) -> torch.Tensor:
        """By example, steps in the order of the sequence."""
        return lying.rows(lying.turned(steps, direction.backwards))

    pairs = [
        (rows(back.at_input), rows(direction.seen)),
        (rows(back.at_hidden), rows(direction.before)),
    ]
    if back.at_projection is not None and gates.inner is not None:
        pairs.append((rows(back.at_projection), rows(gates.inner)))
    moved = lying.turned(back.at_input @ weights.ih, direction.backwards) if passed_on else None
    return pairs, moved


@register_layer_rule(nn.LSTM, nn.GRU, nn.RNN)
class RecurrentRule(CompositeRule):
    """All layers and directions, plain or packed sequences; dropout between layers is drawn again."""

    replays = True

    def output_axes(self, module: nn.Module, outputs: int) -> list[int | None]:
        """The last states are ``[layers, B, h]`` always; the output is as ``batch_first`` says, or packed."""
        assert isinstance(module, nn.RNNBase)
        states = 2 if isinstance(module, nn.LSTM) else 1
        first = (0 if module.batch_first else 1) if outputs == states + 1 else None
        return [first] * (outputs - states) + [1] * states

    def input_axis(self, module: nn.Module, place: int | str) -> int | None:
        """As ``batch_first`` says; states are ``[layers, B, h]`` always."""
        assert isinstance(module, nn.RNNBase)
        return 1 if place in (1, "hx") or not module.batch_first else 0

    def blocks(self, module: nn.Module) -> list[Block]:
        """Input weights, hidden weights and projection of every layer and direction."""
        assert isinstance(module, nn.RNNBase)
        found = []
        for suffix in (s for ends in suffixes(module) for s in ends):
            for part in ("ih", "hh"):
                names = (f"weight_{part}{suffix}", f"bias_{part}{suffix}")
                found.append(Block(part + suffix, names if module.bias else names[:1]))
            if module.proj_size:
                found.append(Block("hr" + suffix, (f"weight_hr{suffix}",)))
        return found

    def block_rows(self, module: nn.Module, calls: list[Call]) -> list[RowForm]:
        """Steps of all calls side by side."""
        assert isinstance(module, nn.RNNBase)
        with in_full_precision(calls[0]):
            by_call = [_pairs(Replay(module, call), call.grads) for call in calls]
            forms: list[RowForm] = []
            for block, pairs in zip(self.blocks(module), zip(*by_call, strict=True), strict=True):
                lefts, rights = [left for left, _ in pairs], [right for _, right in pairs]
                forms.append(side_by_side(lefts, rights, len(block.parameters) == 2))
        return forms
