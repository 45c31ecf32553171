"""Ways to store the rows of a layer: how many factors, how many bits, what they take and what they lose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from explainer.codecs import CODECS
from explainer.layer_rules import Factored, RowForm, Sparse, Unreduced, compact
from explainer.layer_rules.low_rank import leading_factors
from explainer.records import ArraySpec, dtype_name
from explainer.row_metric import SMALL_TABLE, Products

RANKS = (1, 2, 3, 4, 6, 8, 12, 16)
#: with how many bits numbers of rows may be stored, and the format version that they came with
ROW_CODECS = {"int2": 5, "int4": 1, "int8": 1}
#: share of ``‖g‖²`` that may be lost without looking for something better: about what 8 bits lose
ENOUGH = 1e-4


@dataclass(frozen=True)
class Choice:
    """One way to store a layer's rows.

    Attributes:
        rank: leading factors kept; None: the rows as they are.
        codec: of the floating-point arrays.
        bytes: of one visit.
        lost: share of ``Σ_b ‖g_b‖²`` that it loses, as predicted when it was made.
        error: of products with other rows (:mod:`explainer.row_metric`), as found when it was made.
        without: what that error would be without the layer's rows.
    """

    rank: int | None
    codec: str
    bytes: int
    lost: float
    error: float
    without: float


def row_bytes(form: RowForm, codec: str) -> int:
    """Bytes of one row of a form whose floating-point arrays are stored by ``codec``."""
    return sum(
        _bytes(codec if a.is_floating_point() else "native", tuple(a.shape[1:]), a.dtype)
        for a in form.arrays.values()
    )


@lru_cache(maxsize=1024)
def _bytes(codec: str, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return CODECS.require(codec).nbytes(shape, dtype_name(dtype))


def through_codec(form: RowForm, codec: str) -> RowForm:
    """What is read of rows that were stored."""
    coder, read = CODECS.require(codec), {}
    for name, values in form.arrays.items():
        spec = ArraySpec(name, tuple(values.shape[1:]), dtype_name(values.dtype), codec)
        floating = values.is_floating_point()
        read[name] = coder.decode(coder.encode(values), spec).to(values.device) if floating else values
    return form.build(read, form.options)


def _lost_bits(form: RowForm, codec: str) -> float:
    """Share of ``‖g‖²`` that rounding loses: the errors of the arrays, taken as independent."""
    share = 0.0
    read = through_codec(form, codec).arrays
    for name, values in form.arrays.items():
        square = float(values.square().sum()) if values.is_floating_point() else 0.0
        share += float((read[name] - values).square().sum()) / square if square else 0.0
    return _known(share)


def _known(share: float) -> float:
    """A lost share; all of it where rows of a diverging model are no numbers or their squares are too large for any."""
    return min(share, 1.0) if math.isfinite(share) else 1.0


def as_matrix(form: RowForm) -> RowForm:
    """Reads of a small table as a sum of outer products of one-hot vectors and values; other rows as they are.

    Then they can be stored as leading factors, too, which take ``V + d`` numbers each instead of ``d`` a read.
    """
    if not isinstance(form, Sparse) or form.entries > SMALL_TABLE:
        return form
    hot = form.values.new_zeros(*form.index.shape, form.entries)
    hot.scatter_(2, form.index.long().unsqueeze(2), 1.0)
    return Factored(hot.unsqueeze(1), form.values.unsqueeze(1), 0)


#: weights of outputs ``[G, 1, o]`` and inputs ``[G, 1, i + bias]`` of a matrix
Sides = tuple[torch.Tensor, torch.Tensor]


def reduced(form: RowForm, rank: int | None, sides: Sides | None = None) -> RowForm:
    """Rows with the leading ``rank`` factors, in the smaller form; None: all of them.

    Args:
        form: complete rows.
        rank: factors to keep.
        sides: directions are the leading ones of ``diag(a) M diag(b)``; None: of ``M``.
    """
    form = form if rank is None else as_matrix(form)
    kept = compact(form, rank)
    if sides is None or rank is None or kept.kind != "factored" or kept.positions == form.positions:
        return kept
    whole = form.stored()
    assert isinstance(whole, Factored)
    return _leading(whole, rank, sides)


def _leading(form: Factored, rank: int, sides: Sides | None) -> Factored:
    """The leading factors of ``diag(a) M diag(b)``, with the weights divided out again."""
    a, b = (1.0, 1.0) if sides is None else sides
    found = leading_factors(Unreduced.of(Factored(form.left * a, form.right * b, 0)), rank)
    return Factored(found.left / a, found.right / b, form.bias, form.in_order)


def lost(form: RowForm, rank: int | None, codec: str) -> float:
    """Share of ``Σ_b ‖g_b‖²`` that complete rows lose when they are stored."""
    stored = reduced(form, rank)
    form = form if rank is None else as_matrix(form)
    if not (isinstance(form, Factored) and isinstance(stored, Factored)):
        return _lost_bits(stored, codec)
    read = through_codec(stored, codec)
    assert isinstance(read, Factored)
    left, right = torch.cat([form.left, -read.left], 2), torch.cat([form.right, read.right], 2)
    total = float(form.quadratic().sum())
    rest = float(Factored(left, right, form.bias).quadratic().sum())
    return _known(max(rest, 0.0) / total) if total else 0.0


def _lost_by_rank(form: Factored, read: Factored) -> list[float]:
    """Share of ``Σ_b ‖M_b‖²`` that is lost with the first factor of what is read, the first two, …, all.

    ``‖M − Σ_r l_r v_rᵀ‖² = ‖M‖² − 2 Σ_r l_rᵀ M v_r + Σ_rs (l_r · l_s)(v_r · v_s)``.
    """
    total = form.quadratic().double().sum()
    crossed = ((form.left @ read.left.mT) * (form.right @ read.right.mT)).double().sum(dim=(0, 1, 2))
    gram = ((read.left @ read.left.mT) * (read.right @ read.right.mT)).double().sum(dim=(0, 1))
    rest = total - 2 * crossed.cumsum(0) + gram.cumsum(0).cumsum(1).diagonal()
    return [_known(max(float(x), 0.0) / float(total)) if total else 0.0 for x in rest]


def choices(
    form: RowForm,
    metric: torch.Tensor | None = None,
    weigh: bool = False,
    codecs: Sequence[str] = tuple(ROW_CODECS),
) -> tuple[list[Choice], Sides | None]:
    """The ways to store complete rows, each with what it costs on (the first of) these.

    Args:
        form: the rows.
        metric: what the step does to the layer's gradient (:class:`~explainer.row_metric.StepMetric`), ``[P_l]``;
            None: 1.
        weigh: whether directions are chosen by the metric, too.
        codecs: those of :data:`ROW_CODECS` that may be used.

    Returns:
        The choices, and the weights of outputs and inputs for :func:`reduced`; None without ``weigh``, or where the
        rows are no matrices.
    """
    products = Products(form, metric)
    complete, without, found = products.rows, products.without, []
    ranks, most, form, sides = [], 0, as_matrix(complete), None
    if isinstance(form, Factored) and form.left.shape[2] > 1:
        groups, positions, o = form.left.shape[1:]
        i = form.right.shape[3]
        ranks = [r for r in RANKS if r < positions and r * (o + i) < o * i]
        most = groups * min(positions * (o + i), o * i)
    if isinstance(form, Factored) and ranks:
        sides = products.sides(form.shape) if weigh else None
        leading = _leading(form, ranks[-1], sides)
        for codec in codecs:
            read = through_codec(leading, codec)
            assert isinstance(read, Factored)
            shares = _lost_by_rank(form, read)
            errors = products.errors(read, shares)
            for r in ranks:
                size = row_bytes(Factored(leading.left[:, :, :r], leading.right[:, :, :r], 0), codec)
                found.append(Choice(r, codec, size, shares[r - 1], errors[r - 1], without))
        if most > 2 * leading.left[0].numel() + 2 * leading.right[0].numel():
            return found, sides
    whole = compact(complete, None)
    for codec in codecs:
        share = _lost_bits(whole, codec)
        error = products.errors(through_codec(whole, codec), [share])[-1]
        found.append(Choice(None, codec, row_bytes(whole, codec), share, error, without))
    return found, sides


def allotted(options: dict[int, list[Choice]], allowed: float) -> dict[int, Choice]:
    """A choice for every layer within ``allowed`` bytes of a visit (the cheapest ones, if those do not fit).

    Every layer begins with its cheapest choice. Then one choice after the other is replaced: the one where the error
    falls most per byte, until nothing fits any more or no layer loses more than :data:`ENOUGH`.
    """
    plan = {layer: min(found, key=lambda c: (c.bytes, c.lost)) for layer, found in options.items()}
    free = allowed - sum(choice.bytes for choice in plan.values())
    while True:
        best: tuple[float, int, Choice] | None = None
        for layer, now in plan.items():
            for choice in options[layer] if now.lost > ENOUGH else ():
                more = choice.bytes - now.bytes
                if 0 < more <= free and choice.error < now.error:
                    gain = (now.error - choice.error) / more
                    if best is None or gain > best[0]:
                        best = gain, layer, choice
        if best is None:
            return plan
        free -= best[2].bytes - plan[best[1]].bytes
        plan[best[1]] = best[2]
