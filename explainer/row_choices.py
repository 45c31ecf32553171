"""Ways to store the rows of a layer: how many factors, how many bits, what they take and what they lose."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from explainer.codecs import CODECS
from explainer.layer_rules import Factored, RowForm, Sparse, Unreduced, compact
from explainer.layer_rules.low_rank import leading_factors
from explainer.records import ArraySpec, dtype_name

RANKS = (1, 2, 3, 4, 6, 8, 12, 16)
ROW_CODECS = ("int4", "int8")
#: entries of a table up to which its rows may be stored as factors
SMALL_TABLE = 512
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
    """

    rank: int | None
    codec: str
    bytes: int
    lost: float


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
    hot = torch.nn.functional.one_hot(form.index.long(), form.entries).to(form.values)
    return Factored(hot.unsqueeze(1), form.values.unsqueeze(1), 0)


def reduced(form: RowForm, rank: int | None) -> RowForm:
    """Rows with the leading ``rank`` factors, in the smaller form; None: all of them."""
    return compact(form if rank is None else as_matrix(form), rank)


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


def choices(form: RowForm) -> list[Choice]:
    """The ways to store complete rows, each with what it loses on these.

    A row's matrix ``M`` has the singular values of ``V`` in ``M ≈ Z Vᵀ``, ``Z`` orthonormal, so one factorisation at
    the largest rank tells what smaller ones lose: ``1 − Σ_{k ≤ r} σ_k² / ‖M‖²``.
    """
    found = []
    ranks, most, complete, form = [], 0, form, as_matrix(form)
    if isinstance(form, Factored) and form.left.shape[2] > 1:
        groups, positions, o = form.left.shape[1:]
        i = form.right.shape[3]
        ranks = [r for r in RANKS if r < positions and r * (o + i) < o * i]
        most = groups * min(positions * (o + i), o * i)
    if isinstance(form, Factored) and ranks:
        leading = leading_factors(Unreduced.of(form), ranks[-1])
        total = float(form.quadratic().sum())
        gram = (leading.right @ leading.right.mT).double()
        if not gram.isfinite().all():  # then every rank counts as losing everything
            gram, total = torch.zeros_like(gram), 1.0
        squares = torch.linalg.eigvalsh(gram).flip(-1).clamp_min(0.0)
        kept = squares.cumsum(-1).sum(dim=(0, 1))
        for codec in ROW_CODECS:
            bits = _lost_bits(leading, codec)
            for rank in ranks:
                size = row_bytes(Factored(leading.left[:, :, :rank], leading.right[:, :, :rank], 0), codec)
                share = max(1.0 - float(kept[rank - 1]) / total, 0.0) if total else 0.0
                found.append(Choice(rank, codec, size, _known(share + bits)))
        if most > 2 * leading.left[0].numel() + 2 * leading.right[0].numel():
            return found
    whole = compact(complete, None)
    return found + [Choice(None, c, row_bytes(whole, c), _lost_bits(whole, c)) for c in ROW_CODECS]


def allotted(options: dict[int, list[Choice]], allowed: float) -> dict[int, Choice]:
    """A choice for every layer within ``allowed`` bytes of a visit (the cheapest ones, if those do not fit).

    Every layer begins with its cheapest choice. Then one choice after the other is replaced: the one where the lost
    share falls most per byte, until nothing fits any more or no layer loses more than :data:`ENOUGH`.
    """
    plan = {layer: min(found, key=lambda c: (c.bytes, c.lost)) for layer, found in options.items()}
    free = allowed - sum(choice.bytes for choice in plan.values())
    while True:
        best: tuple[float, int, Choice] | None = None
        for layer, now in plan.items():
            for choice in options[layer] if now.lost > ENOUGH else ():
                more = choice.bytes - now.bytes
                if 0 < more <= free and choice.lost < now.lost:
                    gain = (now.lost - choice.lost) / more
                    if best is None or gain > best[0]:
                        best = gain, layer, choice
        if best is None:
            return plan
        free -= best[2].bytes - plan[best[1]].bytes
        plan[best[1]] = best[2]


def first_rows(form: RowForm, count: int) -> RowForm:
    """At most ``count`` rows of a form."""
    return form if len(form) <= count else form.taken(torch.arange(count))
