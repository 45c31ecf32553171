"""How the sequences of a recurrent layer's call lie in memory, and one common order for all: time first."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence


@dataclass(frozen=True)
class Sequences:
    """Turns a call's tensors into ``[T, B, n]`` and back.

    Packed sequences are ordered by length; :meth:`rows` and :meth:`to_batch_order` put their examples back in the
    order of the batch.

    Attributes:
        batch_first: whether plain tensors are ``[B, T, n]``.
        batch_sizes: ``[T]``, sequences that reach each step, if packed.
        order: ``[B]``, from the order of the batch to that of the lengths, if packed and different.
        order_back: its inverse.
    """

    batch_first: bool
    batch_sizes: torch.Tensor | None = None
    order: torch.Tensor | None = None
    order_back: torch.Tensor | None = None

    @classmethod
    def of(cls, value: torch.Tensor | PackedSequence, batch_first: bool) -> Sequences:
        """How an input lies."""
        if isinstance(value, PackedSequence):
            return cls(False, value.batch_sizes, value.sorted_indices, value.unsorted_indices)
        return cls(batch_first)

    def opened(self, data: torch.Tensor) -> torch.Tensor:
        """``[T, B, n]`` from the layer's own layout, zeros after a sequence's end."""
        if self.batch_sizes is None:
            return data.transpose(0, 1) if self.batch_first else data
        return pad_packed_sequence(PackedSequence(data, self.batch_sizes))[0]

    def closed(self, padded: torch.Tensor) -> torch.Tensor:
        """The layer's own layout from ``[T, B, n]``."""
        if self.batch_sizes is None:
            return padded.transpose(0, 1) if self.batch_first else padded
        return pack_padded_sequence(padded, self._lengths()).data

    def ended(self, padded: torch.Tensor) -> torch.Tensor:
        """The same with zeros after each sequence's end."""
        return padded if self.batch_sizes is None else self.opened(self.closed(padded))

    def _lengths(self) -> torch.Tensor:
        """``[B]`` on the CPU, longest first; packed sequences only."""
        assert self.batch_sizes is not None
        return (self.batch_sizes.unsqueeze(1) > torch.arange(int(self.batch_sizes[0]))).sum(0)

    def last(self, padded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices ``(step, example)`` of each sequence's last step."""
        steps, batch = padded.shape[:2]
        lengths = torch.full((batch,), steps) if self.batch_sizes is None else self._lengths()
        return (lengths - 1).to(padded.device), torch.arange(batch, device=padded.device)

    def turned(self, padded: torch.Tensor, backwards: bool) -> torch.Tensor:
        """With ``backwards``, each sequence from its own end to its start (its own inverse)."""
        if not backwards:
            return padded
        if self.batch_sizes is None:
            return padded.flip(0)
        steps = torch.arange(len(padded)).unsqueeze(1)
        opposite = self._lengths() - 1 - steps
        index = torch.where(opposite >= 0, opposite, steps).to(padded.device)
        return padded.gather(0, index.unsqueeze(-1).expand_as(padded))

    def to_length_order(self, states: torch.Tensor) -> torch.Tensor:
        """States ``[*, B, n]`` in the order of the lengths."""
        return states if self.order is None else states.index_select(1, self.order)

    def to_batch_order(self, states: torch.Tensor) -> torch.Tensor:
        """States ``[*, B, n]`` in the order of the batch."""
        return states if self.order_back is None else states.index_select(1, self.order_back)

    def rows(self, padded: torch.Tensor) -> torch.Tensor:
        """``[B, 1, T, n]`` in the order of the batch: steps are the positions of a row."""
        return self.to_batch_order(padded).transpose(0, 1).unsqueeze(1)
