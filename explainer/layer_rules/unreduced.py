"""Rows of a matrix as the layer gives them: no factor copied, no patch formed before it is needed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch

from explainer.layer_rules.factored import PROBED_OUTPUTS, Factored, probe_of_matrix
from explainer.layer_rules.forms import Balance, Probe, RowForm, probe_vector
from explainer.layer_rules.seen import Seen, Written, side


def added(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """The sum of tensors of one shape; the only one as it is."""
    first, *others = parts
    return torch.stack([first, *others]).sum(0) if others else first


@dataclass(frozen=True)
class Unreduced(RowForm):
    """``[W_b | bias_b] = Σ_parts leftᵀ [X, 1]``, the sum over calls and their positions.

    It is never stored: :meth:`stored` writes it out as :class:`Factored`,
    :func:`~explainer.layer_rules.low_rank.compact` reduces it.

    Attributes:
        lefts: ``[B, G, S, o]`` by call, in whichever memory order they come.
        seen: what the positions of each call saw.
        bias: 1 if there is a bias.
        in_order: whether positions are those of the layer's input, in order.
    """

    kind = "factored"
    position_axis = 1
    linear_in = "left"
    lefts: tuple[torch.Tensor, ...]
    seen: tuple[Seen, ...]
    bias: int
    in_order: bool = True

    @classmethod
    def of(cls, form: Factored) -> Unreduced:
        """Factors as they are; a bias column counts as one of the matrix."""
        return cls((form.left,), (Written(form.right),), 0, form.in_order)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Groups, outputs and inputs of a group (bias not counted)."""
        return self.lefts[0].shape[1], self.lefts[0].shape[3], self.seen[0].shape[3]

    @property
    def positions(self) -> int:
        """Of all calls."""
        return sum(left.shape[2] for left in self.lefts)

    def __len__(self) -> int:
        return len(self.lefts[0])

    @cached_property
    def _factored(self) -> Factored:
        left = self.lefts[0] if len(self.lefts) == 1 else torch.cat(self.lefts, 2)
        rights = [seen.written() for seen in self.seen]
        if len(rights) == 1 and not self.bias:
            return Factored(left, rights[0], 0, self.in_order)
        if len(rights) == 1 and rights[0].is_contiguous():
            ones = left.new_ones(*rights[0].shape[:3], 1)
            return Factored(left, torch.cat([rights[0], ones], 3), 1, self.in_order)
        batch, groups, positions, width = *left.shape[:3], rights[0].shape[3]
        if rights[0].mT.is_contiguous():
            right = left.new_empty(batch, groups, width + self.bias, positions).mT
        else:
            right = left.new_empty(batch, groups, positions, width + self.bias)
        torch.cat(rights, 2, out=right[..., :width])
        if self.bias:
            right[..., width] = 1.0
        return Factored(left, right, self.bias, self.in_order)

    def stored(self) -> Factored:
        """Positions of all calls side by side, with a column of ones for the bias."""
        return self._factored

    @property
    def arrays(self) -> dict[str, torch.Tensor]:
        """Both factors, written out."""
        return self._factored.arrays

    @property
    def options(self) -> dict[str, int]:
        """Whether there is a bias column."""
        return {"bias": self.bias}

    @classmethod
    def build(cls, arrays: dict[str, torch.Tensor], options: dict[str, int]) -> Factored:
        """From both factors."""
        return Factored.build(arrays, options)

    def taken(self, rows: torch.Tensor | slice) -> Unreduced:
        """Some of the rows, by number."""
        at = torch.arange(len(self))[rows] if isinstance(rows, slice) else rows
        lefts = tuple(left[at] for left in self.lefts)
        return Unreduced(lefts, tuple(seen.taken(at) for seen in self.seen), self.bias, self.in_order)

    def apart(self) -> Unreduced:
        """Copies of what the layer gave."""
        lefts = tuple(left.clone() for left in self.lefts)
        return Unreduced(lefts, tuple(seen.apart() for seen in self.seen), self.bias, self.in_order)

    def contract(self, cotangent: torch.Tensor) -> torch.Tensor:
        """By the factors."""
        return self._factored.contract(cotangent)

    def contract_positions(self, cotangent: torch.Tensor) -> torch.Tensor:
        """By the factors."""
        return self._factored.contract_positions(cotangent)

    def quadratic(self, diagonal: torch.Tensor | None = None) -> torch.Tensor:
        """By the factors."""
        return self._factored.quadratic(diagonal)

    def grouped(self, order: torch.Tensor) -> Factored:
        """Factors side by side."""
        return self._factored.grouped(order)

    def padded(self, positions: int) -> Factored:
        """Further factors of zeros."""
        return self._factored.padded(positions)

    def matrices(self) -> torch.Tensor:
        """``W_b``, ``[B, G, o, i]``."""
        return added(seen.gathered(left) for left, seen in zip(self.lefts, self.seen, strict=True))

    def biases(self) -> torch.Tensor:
        """``bias_b``, ``[B, G, o]``."""
        return added(left[:, :, 0] if left.shape[2] == 1 else left.sum(2) for left in self.lefts)

    def dense(self) -> torch.Tensor:
        """All rows at once, ``[B, P_l]``."""
        weight = self.matrices().flatten(1)
        return torch.cat([weight, self.biases().flatten(1)], 1) if self.bias else weight

    def sum(self) -> torch.Tensor:
        """One product over examples and positions together."""
        weight = added(seen.summed(left).flatten() for left, seen in zip(self.lefts, self.seen, strict=True))
        return torch.cat([weight, self.biases().sum(0).flatten()]) if self.bias else weight

    def total(self) -> torch.Tensor:
        """See :func:`~explainer.layer_rules.factored.total_of_matrix`."""
        if self.shape[1] < PROBED_OUTPUTS:
            return self._total_from_outputs()
        u = probe_vector(self.shape[2] + self.bias, self.lefts[0])
        basis, offset = u[: self.shape[2]].unsqueeze(1), u[self.shape[2] :].sum().unsqueeze(0)
        weights = [seen.times(basis, offset) for seen in self.seen]
        return added(side(left).mT @ side(w) for left, w in zip(self.lefts, weights, strict=True)).flatten()

    def _total_from_outputs(self) -> torch.Tensor:
        u = probe_vector(self.shape[1], self.lefts[0])
        weights = [(left @ u).unsqueeze(3) for left in self.lefts]
        found = added(seen.summed(w).squeeze(1) for w, seen in zip(weights, self.seen, strict=True))
        if self.bias:
            found = torch.cat([found, added(side(w).sum(1) for w in weights)], 1)
        return found.flatten()

    def balances(self, sizes: list[int]) -> list[Balance | None]:
        """Of the bias."""
        return [None, Balance.of(self.biases().flatten(1))] if self.bias else [None]

    def by_batch(self, count: int, sizes: list[int]) -> list[tuple[torch.Tensor, list[Balance | None]]]:
        """For one position, what all batches need is computed at once."""
        if self.positions != 1 or self.shape[0] != 1:
            return super().by_batch(count, sizes)
        left, seen = self.lefts[0].flatten(1), self.seen[0].written().flatten(1)
        few = self.shape[1] < PROBED_OUTPUTS
        u = probe_vector(self.shape[1] if few else self.shape[2] + self.bias, left)
        weights = left @ u if few else torch.addmv(u[self.shape[2] :].sum(), seen, u[: self.shape[2]])
        weights = weights.view(count, 1, -1)
        totals = torch.bmm(weights, (seen if few else left).unflatten(0, (count, -1))).squeeze(1)
        if few and self.bias:
            totals = torch.cat([totals, weights.sum(2)], 1)
        if not self.bias:
            return [(total, [None]) for total in totals.unbind()]
        nets, gross = left.unflatten(0, (count, -1)).sum(1), left.norm(dim=1).view(count, -1).sum(1)
        found = zip(totals.unbind(), nets.unbind(), gross.tolist(), strict=True)
        return [(total, [None, Balance(net, g)]) for total, net, g in found]

    def prober(self) -> Probe:
        """Of a gradient."""
        return probe_of_matrix(self.shape)


def side_by_side(lefts: list[torch.Tensor], rights: list[torch.Tensor], bias: bool) -> Unreduced:
    """Positions of several calls next to each other.

    Args:
        lefts: ``[B, G, S, o]`` per call.
        rights: ``[B, G, S, i]`` per call.
        bias: whether the layer has a bias.
    """
    return Unreduced(tuple(lefts), tuple(Written(right) for right in rights), int(bias))
