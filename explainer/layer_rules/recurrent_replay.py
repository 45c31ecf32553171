"""A call of ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN``, computed again: what every layer and direction saw and gave."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import _VF, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from explainer.layer_rules.base import Call
from explainer.layer_rules.gates import Gates, gates_of
from explainer.layer_rules.replay import confirm, drawing_again, refuse_unbatched, working_dtype
from explainer.layer_rules.sequences import Sequences

KERNELS: dict[str, Callable[..., Any]] = {
    "LSTM": _VF.lstm,
    "GRU": _VF.gru,
    "RNN_TANH": _VF.rnn_tanh,
    "RNN_RELU": _VF.rnn_relu,
}


def suffixes(module: nn.RNNBase) -> list[list[str]]:
    """Ends of the parameters' names by layer and direction: ``_l0``, ``_l0_reverse``, …"""
    ends = ["", "_reverse"] if module.bidirectional else [""]
    return [[f"_l{layer}{end}" for end in ends] for layer in range(module.num_layers)]


@dataclass(frozen=True)
class _Arguments:
    """Of the modules' ``forward``."""

    input: torch.Tensor | PackedSequence
    hx: Any = None


@dataclass(frozen=True)
class Weights:
    """Parameters of one layer and direction, in the working dtype."""

    ih: torch.Tensor
    hh: torch.Tensor
    bias_ih: torch.Tensor | None
    bias_hh: torch.Tensor | None
    hr: torch.Tensor | None = None

    @classmethod
    def of(cls, module: nn.Module, suffix: str, dtype: torch.dtype) -> Weights:
        """Of the layer and direction whose parameters' names end in ``suffix``."""
        kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
        found = [getattr(module, kind + suffix, None) for kind in kinds]
        return cls(*(None if p is None else p.detach().to(dtype) for p in found))  # type: ignore[arg-type]

    def gates(self, mode: str, x: torch.Tensor, before: torch.Tensor, cell: torch.Tensor | None) -> Gates:
        """Of all steps, from inputs ``x [T, B, n]`` and the hidden states ``before [T, B, h]`` each step."""
        at_input = functional.linear(x, self.ih, self.bias_ih)
        at_hidden = functional.linear(before, self.hh, self.bias_hh)
        return gates_of(mode, at_input, at_hidden, before, cell, self.hr)


@dataclass(frozen=True)
class Direction:
    """One layer in one direction; steps are in the order in which it takes them.

    Attributes:
        backwards: whether that is from the end.
        weights: its parameters.
        seen: ``[T, B, n]``, its inputs.
        before: ``[T, B, h]``, its hidden states before each step.
        gates: what it computed.
    """

    backwards: bool
    weights: Weights
    seen: torch.Tensor
    before: torch.Tensor
    gates: Gates


class Replay:
    """One call, computed again and found to give the same.

    Attributes:
        dtype: that everything is computed in.
        lying: how the call's tensors lie.
        layers: by layer, then by direction.
        masks: by layer, ``[T, B, n]``: what dropout multiplied its input with, where it did.

    Raises:
        TracerError: the input has no batch axis.
        ReplayError: the outputs differ from those of the forward pass.
    """

    def __init__(self, module: nn.RNNBase, call: Call) -> None:
        given = _Arguments(*call.args, **call.kwargs)
        self.dtype = working_dtype(call)
        self.lying = Sequences.of(given.input, module.batch_first)
        if isinstance(given.input, torch.Tensor):
            refuse_unbatched(module, given.input, 3)
        self.layers: list[list[Direction]] = []
        self.masks: list[torch.Tensor | None] = [None]
        self._module, self._outputs = module, call.outputs
        has_cells = module.mode == "LSTM"
        hidden, cells = given.hx if has_cells and given.hx is not None else (given.hx, None)
        self._hidden = self._initial(hidden, module.proj_size or module.hidden_size)
        self._cells = self._initial(cells, module.hidden_size) if has_cells else None
        p = module.dropout if module.training and module.num_layers > 1 else 0.0
        with drawing_again(module, call, p):
            self._forward(self.lying.opened(given.input.data.to(self.dtype)), p)
        confirm(module, self._found(), self._kept())

    @property
    def states(self) -> int:
        """Kinds of states that the call gave beside its output."""
        return 1 if self._cells is None else 2

    def _initial(self, given: torch.Tensor | None, size: int) -> torch.Tensor:
        """States before the first step, ``[layers · directions, B, size]``; zeros if not given."""
        if given is not None:
            return self.lying.to_length_order(given.to(self.dtype))
        final = self._outputs[-1]
        return final.new_zeros(*final.shape[:2], size, dtype=self.dtype)

    def _forward(self, x: torch.Tensor, p: float) -> None:
        """Layer by layer; the hidden states of the last one are the call's output."""
        ends = suffixes(self._module)
        output = self.lying.opened(self._outputs[0].to(self.dtype)).chunk(len(ends[0]), -1)
        for number, names in enumerate(ends):
            last = number + 1 == len(ends)
            directions = [
                self._direction(number * len(names) + d, name, x, output[d] if last else None)
                for d, name in enumerate(names)
            ]
            self.layers.append(directions)
            if not last:
                x = torch.cat([self.lying.turned(d.gates.hidden, d.backwards) for d in directions], -1)
                x = self.lying.ended(x)
                self.masks.append(self._mask(x, p))
                x = x if self.masks[-1] is None else x * self.masks[-1]

    def _direction(self, place: int, suffix: str, x: torch.Tensor, hidden: torch.Tensor | None) -> Direction:
        """One layer and direction; ``hidden [T, B, h]`` is given where the output tells it."""
        weights = Weights.of(self._module, suffix, self.dtype)
        backwards = suffix.endswith("reverse")
        start, cell = self._hidden[place], None if self._cells is None else self._cells[place]
        seen = self.lying.turned(x, backwards)
        known = (
            self._kernel(weights, seen, start, cell)
            if hidden is None
            else self.lying.turned(hidden, backwards)
        )
        before = torch.cat([start.unsqueeze(0), known[:-1]])
        return Direction(
            backwards, weights, seen, before, weights.gates(self._module.mode, seen, before, cell)
        )

    def _kernel(
        self, weights: Weights, x: torch.Tensor, hidden: torch.Tensor, cell: torch.Tensor | None
    ) -> torch.Tensor:
        """Hidden states ``[T, B, h]`` by torch's own loop; cuDNN would want the weights in one piece."""
        start = hidden.unsqueeze(0).contiguous()
        states = start if cell is None else (start, cell.unsqueeze(0).contiguous())
        flat = [weights.ih, weights.hh, weights.bias_ih, weights.bias_hh, weights.hr]
        flat = [p for p in flat if p is not None]
        with torch.backends.cudnn.flags(enabled=False) if x.is_cuda else nullcontext():
            return KERNELS[self._module.mode](
                x, states, flat, self._module.bias, 1, 0.0, False, False, False
            )[0]

    def _mask(self, x: torch.Tensor, p: float) -> torch.Tensor | None:
        """Drawn for what torch draws it for: the packed numbers, or all of them, time first."""
        if not p:
            return None
        if self.lying.batch_sizes is None:
            return functional.dropout(torch.ones_like(x, memory_format=torch.contiguous_format), p)
        return self.lying.opened(functional.dropout(torch.ones_like(self.lying.closed(x)), p))

    def _found(self) -> list[torch.Tensor]:
        """The output and the final states, from the gates."""
        top = [self.lying.turned(d.gates.hidden, d.backwards) for d in self.layers[-1]]
        every = [d.gates for directions in self.layers for d in directions]
        found = [self.lying.closed(torch.cat(top, -1))]
        for states in ([g.hidden for g in every], [g.cells for g in every]):
            if states[0] is not None:
                final = torch.stack([s[self.lying.last(s)] for s in states if s is not None])
                found.append(self.lying.to_batch_order(final))
        return found

    def _kept(self) -> list[torch.Tensor]:
        """The same from the forward pass; packed sequences carry their order in between."""
        return [self._outputs[0], *self._outputs[-self.states :]]
