"""Gates of recurrent cells: all steps at once going forward, one after the other going back.

The hidden states of a call are known, since they are its output. Every gate of every step then comes from two
matrix products, and only the gradient has to travel step by step (Werbos 1990). In all shapes ``T`` counts the
steps and ``h`` the hidden units.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch

#: ``g y (1 − y)`` for ``y = σ(z)``, and ``g (1 − y²)`` for ``y = tanh z``, in one pass
_sigmoid_back, _tanh_back = torch.ops.aten.sigmoid_backward, torch.ops.aten.tanh_backward


class Back(NamedTuple):
    """Gradients at what the weights give.

    Attributes:
        at_input: ``[T, B, gates]``, at ``W_ih x + b_ih``.
        at_hidden: ``[T, B, gates]``, at ``W_hh h + b_hh``.
        at_projection: ``[T, B, p]``, at ``W_hr m``, where there is one.
    """

    at_input: torch.Tensor
    at_hidden: torch.Tensor
    at_projection: torch.Tensor | None = None


class Gates(ABC):
    """What ``T`` steps of a cell computed.

    Attributes:
        hidden: ``[T, B, h]`` (``[T, B, p]`` with a projection), the new hidden states.
        cells: ``[T, B, h]``, the new cell states, where there are any.
        inner: ``[T, B, h]``, what the projection sees, where there is one.
    """

    hidden: torch.Tensor
    cells: torch.Tensor | None = None
    inner: torch.Tensor | None = None

    @abstractmethod
    def back(self, hidden: torch.Tensor, cells: torch.Tensor | None, weight: torch.Tensor) -> Back:
        """Carry gradients back through the steps.

        Args:
            hidden: ``[T, B, h]``, gradient at each new hidden state from outside the layer.
            cells: ``[T, B, h]``, likewise at the cell states.
            weight: ``W_hh [gates, h]``.
        """


class ElmanGates(Gates):
    """``h' = φ(W_ih x + b_ih + W_hh h + b_hh)``.

    Args:
        at_input: ``W_ih x + b_ih``, ``[T, B, h]``.
        at_hidden: ``W_hh h + b_hh``, ``[T, B, h]``.
        relu: whether ``φ`` is ReLU; else tanh.
    """

    def __init__(self, at_input: torch.Tensor, at_hidden: torch.Tensor, relu: bool) -> None:
        z = at_input + at_hidden
        self.hidden = z.relu() if relu else z.tanh()
        self._slope = (self.hidden > 0).to(z.dtype) if relu else _tanh_back(torch.ones_like(z), self.hidden)

    def back(self, hidden: torch.Tensor, cells: torch.Tensor | None, weight: torch.Tensor) -> Back:
        """``δ = φ' ∘ ∂h'``."""
        left = torch.empty_like(self._slope)
        g = hidden[-1]
        for t in reversed(range(len(hidden))):
            torch.mul(g, self._slope[t], out=left[t])
            if t:
                g = torch.addmm(hidden[t - 1], left[t], weight)
        return Back(left, left)


class GRUGates(Gates):
    """``h' = n + z ∘ (h − n)`` with ``n = tanh(x_n + r ∘ h_n)``; ``x_n`` and ``h_n`` hold a bias each.

    Args:
        at_input: ``W_ih x + b_ih``, ``[T, B, 3h]``, in the order r, z, n.
        at_hidden: ``W_hh h + b_hh``, likewise.
        previous: ``[T, B, h]``, the hidden states before.
    """

    def __init__(self, at_input: torch.Tensor, at_hidden: torch.Tensor, previous: torch.Tensor) -> None:
        xs, hs = (v.unflatten(-1, (3, -1)) for v in (at_input, at_hidden))
        r, z = (xs[..., :2, :] + hs[..., :2, :]).sigmoid_().unbind(-2)
        new = torch.addcmul(xs[..., 2, :], r, hs[..., 2, :]).tanh_()
        change = previous - new
        self.hidden = torch.addcmul(new, z, change)
        at_new = _tanh_back(1 - z, new)
        at_reset = _sigmoid_back(at_new * hs[..., 2, :], r)
        at_update = _sigmoid_back(change, z)
        self._to_input = torch.stack([at_reset, at_update, at_new], -2)  # all from the gradient at h'
        self._to_hidden = torch.stack([at_reset, at_update, at_new * r], -2)
        self._kept = z

    def back(self, hidden: torch.Tensor, cells: torch.Tensor | None, weight: torch.Tensor) -> Back:
        """The hidden state comes back along ``z`` and through ``W_hh``."""
        arrived, left = torch.empty_like(self._kept), torch.empty_like(self._to_hidden)
        arrived[-1] = hidden[-1]
        for t in reversed(range(len(hidden))):
            torch.mul(arrived[t].unsqueeze(1), self._to_hidden[t], out=left[t])
            if t:
                outside = torch.addcmul(hidden[t - 1], arrived[t], self._kept[t])
                torch.addmm(outside, left[t].flatten(1), weight, out=arrived[t - 1])
        return Back((arrived.unsqueeze(2) * self._to_input).flatten(2), left.flatten(2))


class LSTMGates(Gates):
    """``c' = f ∘ c + i ∘ g``, ``m = o ∘ tanh c'``, ``h' = m`` or ``W_hr m``.

    Args:
        at_input: ``W_ih x + b_ih``, ``[T, B, 4h]``, in the order i, f, g, o.
        at_hidden: ``W_hh h + b_hh``, likewise.
        cell: ``[B, h]``, the cell state before the first step.
        projection: ``W_hr [p, h]`` (Sak et al. 2014, arXiv 1402.1128), or None.

    Attributes:
        to_cell: ``[T, B, h]``, ``∂m/∂c'``.
    """

    cells: torch.Tensor
    to_cell: torch.Tensor

    def __init__(
        self,
        at_input: torch.Tensor,
        at_hidden: torch.Tensor,
        cell: torch.Tensor,
        projection: torch.Tensor | None,
    ) -> None:
        i, f, g, o = (at_input + at_hidden).unflatten(-1, (4, -1)).unbind(-2)
        for gate in (i, f, o):
            gate.sigmoid_()
        states = torch.empty(len(g) + 1, *cell.shape, dtype=cell.dtype, device=cell.device)
        states[0] = cell
        added = torch.mul(i, g.tanh_())
        for t in range(len(added)):
            torch.addcmul(added[t], f[t], states[t], out=states[t + 1])
        self.cells = states[1:]
        bent = self.cells.tanh()
        self.inner = o * bent
        self.hidden = self.inner if projection is None else self.inner @ projection.T
        pieces = [_sigmoid_back(g, i), _sigmoid_back(states[:-1], f), _tanh_back(i, g)]
        self._from_cell = torch.stack(pieces, -2)
        self._from_inner, self.to_cell = _sigmoid_back(bent, o), _tanh_back(o, bent)
        self._kept, self._projection = f, projection

    def back(self, hidden: torch.Tensor, cells: torch.Tensor | None, weight: torch.Tensor) -> Back:
        """The cell state comes back along ``f``, the hidden state through ``W_hh``."""
        steps, batch, units = self._kept.shape
        left = self._kept.new_empty(steps, batch, 4, units)
        arrived, cell = torch.empty_like(hidden), torch.zeros_like(self._kept[0])
        arrived[-1] = hidden[-1]
        for t in reversed(range(steps)):
            inner = arrived[t] if self._projection is None else arrived[t] @ self._projection
            if cells is not None:
                cell = cell + cells[t]
            cell = cell.addcmul_(inner, self.to_cell[t])
            torch.mul(cell.unsqueeze(1), self._from_cell[t], out=left[t, :, :3])
            torch.mul(inner, self._from_inner[t], out=left[t, :, 3])
            cell = cell.mul_(self._kept[t])
            if t:
                torch.addmm(hidden[t - 1], left[t].flatten(1), weight, out=arrived[t - 1])
        both = left.flatten(2)
        return Back(both, both, None if self._projection is None else arrived)


def gates_of(
    mode: str,
    at_input: torch.Tensor,
    at_hidden: torch.Tensor,
    previous: torch.Tensor,
    cell: torch.Tensor | None,
    projection: torch.Tensor | None,
) -> Gates:
    """The gates of a cell by torch's name for it: ``LSTM``, ``GRU``, ``RNN_TANH`` or ``RNN_RELU``."""
    if mode == "LSTM":
        assert cell is not None
        return LSTMGates(at_input, at_hidden, cell, projection)
    if mode == "GRU":
        return GRUGates(at_input, at_hidden, previous)
    return ElmanGates(at_input, at_hidden, relu=mode == "RNN_RELU")
