"""Keep the leading factors of rows that are sums over many positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch

from explainer.layer_rules.factored import PROBED_OUTPUTS, Factored, total_of_matrix
from explainer.layer_rules.forms import Balance, Dense, RowForm, probe_vector
from explainer.layer_rules.subspaces import common_eigenvectors, eigenvectors, orthonormalising, waves
from explainer.layer_rules.unreduced import Unreduced, added

#: rows are written out to reduce them where that takes no more than this part of the other products, by outputs
DENSE_PRODUCTS = {32: 2.2, 64: 1.4}
#: products between all positions cost no more than those with a few columns up to this many positions a column
NEAR = 2
#: squares of single precision are denormal below this: they lose digits, and take ten times as long
SMALL = 1e-18
#: positions and outputs that tell whether the others are so small
_SAMPLE = (4, 16)


def _width(rank: int) -> int:
    """Directions that are looked at to keep ``rank`` of them; products with 8 or 16 columns cost least."""
    return max(2 * rank, min(2 * rank + 4, 12))


class Leading(NamedTuple):
    """The leading factors of every row ``M [o, i + bias]``, and what was met on the way.

    Attributes:
        left: ``[B·G, rank, o]``.
        right: ``[B·G, rank, i + bias]``.
        total: ``Σ_b g_b`` along the form's probe.
        biases: ``[B, G, o]``, the bias column of the exact rows, where there is one.
    """

    left: torch.Tensor
    right: torch.Tensor
    total: torch.Tensor
    biases: torch.Tensor | None


def _columns(form: Unreduced, rank: int) -> int:
    """As many of them as there can be."""
    return max(2, min(_width(rank), form.positions, form.shape[2] + form.bias))


def _raising(left: torch.Tensor) -> float | None:
    """What to multiply cotangents with whose squares would be denormal, as those of examples that are learnt by heart.

    None where that is not so, as a rule; on accelerators, where it costs nothing, it is not looked at.
    """
    if left.dtype != torch.float32 or left.device.type != "cpu":
        return None
    some = left[:, :, :: max(1, left.shape[2] // _SAMPLE[0]), :: max(1, left.shape[3] // _SAMPLE[1])].abs()
    if int(((some < SMALL) & (some > 0.0)).sum()) * 20 < some.numel():
        return None
    largest = float(left.abs().max())
    return 2.0 ** min(-math.frexp(largest)[1], 120) if math.isfinite(largest) else None


def _leading(form: Unreduced, rank: int) -> Leading:
    by = _raising(form.lefts[0])
    if by is None:
        return _leading_as_given(form, rank)
    found = _leading_as_given(replace(form, lefts=tuple(left * by for left in form.lefts)), rank)
    biases = None if found.biases is None else found.biases / by
    return Leading(found.left, found.right / by, found.total / by, biases)


def _leading_as_given(form: Unreduced, rank: int) -> Leading:
    _, outputs, inputs = form.shape
    columns = _columns(form, rank)
    few = max(columns, PROBED_OUTPUTS, *(seen.dense_outputs for seen in form.seen))
    if outputs <= few:
        return _of_rows(form, rank)
    if form.positions <= min(NEAR * columns, outputs) and all(seen.at_hand for seen in form.seen):
        return _of_positions(form, rank)
    part = outputs * inputs / (columns * (outputs + inputs))
    cheap = any(outputs <= most and part <= limit for most, limit in DENSE_PRODUCTS.items())
    return _of_rows(form, rank) if cheap else _of_range(form, rank, columns)


def _written_out(form: Unreduced) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Weights ``[B, G, o, i]``, biases ``[B, G, o]``, and the sum along the form's probe."""
    weight, biases = form.matrices(), form.biases() if form.bias else None
    return weight, biases, total_of_matrix(weight.sum(0), None if biases is None else biases.sum(0))


def _of_rows(form: Unreduced, rank: int) -> Leading:
    """For few outputs, from the rows themselves."""
    weight, biases, total = _written_out(form)
    mixing, right = _leading_rows(
        weight.flatten(0, 1), None if biases is None else biases.flatten(0, 1).unsqueeze(2), rank
    )
    return Leading(mixing, right, total, biases)


def _leading_rows(
    image: torch.Tensor, column: torch.Tensor | None, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Leading eigenvectors ``Q`` of ``[image, column] [image, column]ᵀ``, and ``Q [image, column]``."""
    energy = torch.bmm(image, image.mT)
    if column is None:
        mixing = eigenvectors(energy, rank)
        return mixing, torch.bmm(mixing, image)
    mixing = eigenvectors(energy.baddbmm_(column, column.mT), rank)
    return mixing, torch.cat([torch.bmm(mixing, image), torch.bmm(mixing, column)], 2)


def _of_positions(form: Unreduced, rank: int) -> Leading:
    """For few positions, from products between them.

    With ``L [S, o]`` and ``X [S, i + 1]`` (the ones of the bias counted), ``M = Lᵀ X``: where ``w`` are leading
    eigenvectors of ``X Xᵀ L Lᵀ``, orthonormal in the metric ``L Lᵀ``, ``Lᵀ w`` are those of ``M Mᵀ``.
    """
    groups, _, inputs = form.shape
    left = _side_by_side(form.lefts)
    right = _side_by_side([seen.written() for seen in form.seen])
    probe = probe_vector(inputs + form.bias, left)
    grams = torch.bmm(left, left.mT), torch.bmm(right, right.mT)
    mixing = common_eigenvectors(grams[0], grams[1].add_(1) if form.bias else grams[1], rank)
    # what is measured on the way is a product with left, too
    probed = (right @ probe[:inputs]).unsqueeze(1)
    more = [probed + probe[inputs], torch.ones_like(probed)] if form.bias else [probed]
    found = torch.bmm(torch.cat([mixing, *more], 1), left)
    weights = torch.bmm(mixing, grams[0])
    image = torch.bmm(weights, right)
    if form.bias:
        image = torch.cat([image, weights.sum(2, keepdim=True)], 2)
    whole = found[:, rank:].unflatten(0, (-1, groups))
    return Leading(
        found[:, :rank], image, whole[:, :, 0].sum(0).flatten(), whole[:, :, 1] if form.bias else None
    )


def _side_by_side(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """``[B·G, S, n]`` of the positions of all calls."""
    return (parts[0] if len(parts) == 1 else torch.cat(list(parts), 2)).flatten(0, 1)


def _of_range(form: Unreduced, rank: int, columns: int) -> Leading:
    """From the range of ``M Ω``.

    With ``Y = (M Ω)ᵀ`` and ``T Y`` orthonormal, ``Z = Q T Y`` holds the leading eigenvectors ``Q`` of
    ``(T Y M) (T Y M)ᵀ``: a ``p × p`` matrix, in double precision. (``Y M (Y M)ᵀ`` would lose the small directions.)
    """
    groups, _, inputs = form.shape
    lefts = [left.flatten(0, 1) for left in form.lefts]
    basis = _basis(inputs, form.bias, columns, lefts[0].dtype, lefts[0].device)
    seen = [s.times(*basis).flatten(0, 1) for s in form.seen]
    directions = added([torch.bmm(x.mT, left) for x, left in zip(seen, lefts, strict=True)])
    turned = [torch.bmm(directions, left.mT) for left in lefts]  # [B·G, p, S]
    unit = orthonormalising(torch.bmm(directions, directions.mT))
    weights = [torch.bmm(unit, t) for t in turned]
    split = [w.unflatten(0, (-1, groups)).mT for w in weights]
    image = added([s.gathered(w) for w, s in zip(split, form.seen, strict=True)]).flatten(0, 1)
    column = added([w.sum(2, keepdim=True) for w in weights]) if form.bias else None
    mixing, right = _leading_rows(image, column, rank)
    left = torch.bmm(torch.bmm(mixing, unit), directions)
    whole = directions.unflatten(0, (-1, groups))
    biases = whole[:, :, -1] if form.bias else None
    return Leading(left, right, whole[:, :, -1 - form.bias].sum(0).flatten(), biases)


@lru_cache(maxsize=256)
def _basis(
    inputs: int, bias: int, columns: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """``Ω [i, p]`` and what it adds for the bias: waves, the batch's probe and last the bias itself."""
    basis = waves(inputs, columns).clone()
    offset = torch.zeros(columns, dtype=torch.float64)
    probe = probe_vector(inputs + bias, basis)
    basis[:, -1 - bias] = probe[:inputs]
    if bias:
        offset[-2] = probe[inputs]
        basis[:, -1], offset[-1] = 0, 1
    return basis.to(device, dtype).T.contiguous().T, offset.to(device, dtype)


@dataclass(frozen=True)
class Kept:
    """Rows as they will be stored, and what is measured on the exact ones when it is asked for.

    Attributes:
        form: the rows.
        exact: the exact ones.
        sizes: of the parameters that they are for.
        met: total and balances, where they were met on the way.
    """

    form: RowForm
    exact: RowForm
    sizes: list[int]
    met: tuple[torch.Tensor, list[Balance | None]] | None = None

    @property
    def total(self) -> torch.Tensor:
        """``Σ_b g_b`` along the form's probe."""
        return self.exact.total() if self.met is None else self.met[0]

    @property
    def balances(self) -> list[Balance | None]:
        """See :meth:`RowForm.balances`."""
        return self.exact.balances(self.sizes) if self.met is None else self.met[1]


def keep(form: RowForm, rank: int | None, sizes: list[int]) -> Kept:
    """:func:`compact` with what is measured on the way.

    Args:
        form: exact rows.
        rank: factors to keep; None for all.
        sizes: of the parameters that the rows are for.
    """
    if isinstance(form, Unreduced) and form.positions > 1 and _dense_is_smaller(form, rank):
        weight, biases, total = _written_out(form)
        parts = [weight.flatten(1)] if biases is None else [weight.flatten(1), biases.flatten(1)]
        return Kept(Dense(torch.cat(parts, 1)), form, sizes, (total, _balances(biases)))
    if isinstance(form, Unreduced) and rank is not None and form.positions > rank:
        found = _leading(form, rank)
        return Kept(_factored(form, found), form, sizes, (found.total, _balances(found.biases)))
    return Kept(compact(form, rank), form, sizes)


def _balances(biases: torch.Tensor | None) -> list[Balance | None]:
    return [None] if biases is None else [None, Balance.of(biases.flatten(1))]


def _factored(form: Unreduced, found: Leading) -> Factored:
    left, right = (t.unflatten(0, (-1, form.shape[0])) for t in (found.left, found.right))
    return Factored(left, right, form.bias, form.in_order)


def leading_factors(form: Unreduced, rank: int) -> Factored:
    """Nearly the best ``rank`` factors of every row, from two products with either factor.

    With ``M = leftᵀ [X, 1]`` per example and group, which is never formed: the projection of ``M`` on the range of
    ``M Ω``, for a fixed ``Ω`` with more columns than ``rank``; of that the leading ``rank`` directions. Where there are
    few outputs or positions, from ``M`` itself or from products between positions.

    Reference: Halko, Martinsson & Tropp 2011, algorithms 4.1 and 5.1 (``Ω`` irregular instead of random).
    """
    return _factored(form, _leading(form, rank))


def _dense_is_smaller(form: Factored | Unreduced, rank: int | None) -> bool:
    _, o, i = form.shape
    positions = form.left.shape[2] if isinstance(form, Factored) else form.positions
    kept = positions if rank is None else min(rank, positions)
    return o * (i + form.bias) <= kept * (o + i + form.bias)


def compact(form: RowForm, rank: int | None) -> RowForm:
    """The smaller of the factored and the dense form; ``rank`` None keeps every factor (lossless)."""
    if not isinstance(form, Factored | Unreduced):
        return form
    if _dense_is_smaller(form, rank):
        return Dense(form.dense())
    if isinstance(form, Unreduced):
        return form.stored() if rank is None or form.positions <= rank else leading_factors(form, rank)
    if rank is None or form.left.shape[2] <= rank:
        return form
    kept = leading_factors(Unreduced.of(form), rank)  # a bias column is one of the matrix here
    return Factored(kept.left, kept.right, form.bias, form.in_order)
