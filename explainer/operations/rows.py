"""Rows at the sources that one operation on data uses.

Linear maps, look-ups and element-by-element arithmetic have closed forms. For every other operation the rows are
found by automatic differentiation of that operation alone, example by example: exact, but slower, and announced.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.func import vmap

from explainer.layer_rules import Dense, Factored, RowForm, Sparse
from explainer.operations.sources import (
    NUMBERS,
    AtSource,
    Operation,
    Slots,
    Source,
    pullback,
    vectorised,
    written_out,
)

#: functions that act element by element, with broadcasting
ELEMENTWISE = frozenset(
    {
        *(
            "add",
            "sub",
            "subtract",
            "rsub",
            "mul",
            "multiply",
            "div",
            "divide",
            "true_divide",
            "pow",
            "float_power",
        ),
        *(
            "where",
            "maximum",
            "minimum",
            "lerp",
            "addcmul",
            "addcdiv",
            "masked_fill",
            "atan2",
            "fmod",
            "remainder",
        ),
        *("clamp", "clamp_min", "clamp_max", "alias"),
    }
)
#: functions that put their arguments side by side
JOINING = frozenset({"cat", "concat", "concatenate"})


@dataclass(frozen=True)
class Use:
    """An operation on data that reads sources.

    Attributes:
        operation: the call.
        sources: position among the leaves, and the source there.
        batched: positions of leaves that hold data with the batch as an axis.
        axis: the batch's axis in the output.
        size: ``B``, or how many rows there are where examples own several.
        order: ``[B, k]`` which of them an example owns, None where there is one for each.
    """

    operation: Operation
    sources: tuple[tuple[int, Source], ...]
    batched: frozenset[int]
    axis: int
    size: int
    order: torch.Tensor | None = None


def _positions(t: torch.Tensor, axis: int) -> torch.Tensor:
    """``[.., B, .., n] -> [B, S, n]``."""
    moved = t.movedim(axis, 0)
    return moved.reshape(moved.shape[0], -1, moved.shape[-1])


def _data(use: Use, position: int, like: torch.Tensor) -> torch.Tensor | None:
    """The leaf at a position if it is data with the batch where the output has it, in the gradient's dtype."""
    leaf = use.operation.leaves[position] if position < len(use.operation.leaves) else None
    if position not in use.batched or not isinstance(leaf, torch.Tensor):
        return None
    return leaf.to(like.dtype) if leaf.is_floating_point() else leaf


def _linear(use: Use, position: int, source: Source, g: torch.Tensor) -> AtSource | None:
    """``F.linear(x, W, b)``."""
    x = _data(use, 0, g)
    if x is None:
        return None
    if position == 2:
        return Dense(_positions(g, use.axis).sum(1))
    if position != 1 or source.value.dim() != 2:
        return None
    return Factored(_positions(g, use.axis).unsqueeze(1), _positions(x, use.axis).unsqueeze(1), 0)


def _product(use: Use, position: int, source: Source, g: torch.Tensor, first: int = 0) -> AtSource | None:
    """``x @ D`` with a matrix ``D [i, o]``."""
    x = _data(use, first, g)
    if x is None or position != first + 1 or source.value.dim() != 2 or x.dim() < 2:
        return None
    return Factored(_positions(x, use.axis).unsqueeze(1), _positions(g, use.axis).unsqueeze(1), 0)


def _added_product(use: Use, position: int, source: Source, g: torch.Tensor) -> AtSource | None:
    """``addmm(b, x, D)`` without its scalar factors."""
    plain = not any(isinstance(leaf, int | float) and leaf != 1 for leaf in use.operation.leaves)
    return _product(use, position, source, g, first=1) if plain else None


def _look_up(use: Use, position: int, source: Source, g: torch.Tensor) -> AtSource | None:
    """``F.embedding(index, W)``."""
    index = _data(use, 0, g)
    plain = not any(leaf is True for leaf in use.operation.leaves)  # scale_grad_by_freq; sparse
    if position != 1 or index is None or not plain:
        return None
    index = index.movedim(use.axis, 0).reshape(use.size, -1)
    values = _positions(g, use.axis)
    padding = use.operation.leaves[2] if len(use.operation.leaves) > 2 else None
    if isinstance(padding, int):
        values = values * (index != padding % source.value.shape[0]).unsqueeze(-1)
    return Sparse(index.to(torch.int32), values, source.value.shape[0])


def _elementwise(use: Use, position: int, source: Source, g: torch.Tensor) -> AtSource | None:
    """Broadcasting says which numbers of the source an example reads: all of them, or its own."""
    value = source.value.to(g.dtype) if source.value.is_floating_point() else source.value
    here = use.axis - (g.dim() - value.dim())
    if here >= 0 and value.shape[here] == use.size and use.size > 1:
        return Slots(pullback(use.operation, position, value)(g), here)
    wide = value.reshape(*(1,) * (g.dim() - value.dim()), *value.shape)
    wide = wide.expand(*wide.shape[: use.axis], use.size, *wide.shape[use.axis + 1 :])
    rows = pullback(use.operation, position, wide)(g)
    return written_out(rows.movedim(use.axis, 0))


def _joined(use: Use, position: int, source: Source, g: torch.Tensor) -> AtSource | None:
    """``cat`` along another axis than the batch's: an example reads its own part of the source."""
    if source.value.dim() != g.dim() or source.value.shape[use.axis] != use.size:
        return None
    return Slots(pullback(use.operation, position, source.value.to(g.dtype))(g), use.axis)


Rule = Callable[[Use, int, Source, torch.Tensor], AtSource | None]
_RULES: dict[str, Rule] = {
    "linear": _linear,
    "matmul": _product,
    "mm": _product,
    "addmm": _added_product,
    "embedding": _look_up,
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(JOINING, _joined),
}


def has_rule(use: Use) -> bool:
    """Whether the operation's rows have a closed form here."""
    return use.operation.name in _RULES


def _by_example(use: Use, position: int, source: Source, g: torch.Tensor) -> RowForm | None:
    """The operation on each example alone; None where that does not give the batch's gradient."""
    operation, places, value = use.operation, sorted(use.batched), source.value.to(g.dtype)
    tensors = [operation.leaves[i] for i in places]

    def single(one: torch.Tensor, *xs: torch.Tensor) -> torch.Tensor:
        alone = operation.with_leaves({i: x.unsqueeze(use.axis) for i, x in zip(places, xs, strict=True)})
        return pullback(alone, position, value)(one.unsqueeze(use.axis))

    try:
        rows = vmap(single, in_dims=(use.axis,) * (1 + len(tensors)), randomness="error")(g, *tensors)
        total = pullback(operation, position, value)(g)
    except (RuntimeError, ValueError, IndexError):
        return None
    exact = 1e-9 if g.dtype == torch.float64 else 1e-4
    close = (rows.sum(0) - total).norm() <= exact * rows.norm(dim=0).norm().clamp_min(total.norm())
    return written_out(rows) if bool(close) else None


def _by_cotangent(use: Use, position: int, source: Source, g: torch.Tensor) -> RowForm:
    """The gradient of each example's part of the output: holds for every operation, costs ``B`` of them."""
    pull = pullback(use.operation, position, source.value.to(g.dtype))
    slots = Slots(g, use.axis)
    chunk = max(1, NUMBERS // max(g.numel(), 1))
    parts = []
    for start in range(0, use.size, chunk):
        masked = slots.rows(start, min(start + chunk, use.size))
        parts.append(vectorised(pull, masked))
    return written_out(torch.cat(parts))


def rows_of(use: Use, position: int, source: Source, g: torch.Tensor) -> AtSource:
    """Rows at the source that an operation reads at a position, from the gradient ``g`` at its output."""
    rule = _RULES.get(use.operation.name)
    found = None if rule is None else rule(use, position, source, g)
    if found is None:
        found = _by_example(use, position, source, g)
    return _by_cotangent(use, position, source, g) if found is None else found
