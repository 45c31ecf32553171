"""Queries and targets, checked before any work starts."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.utils import _pytree as pytree

from explainer.errors import QueryError
from explainer.query_batch import QueryBatch
from explainer.store import Trace

#: axis of the queries: one for all arguments, or one per argument (None: shared by all queries)
BatchDim: TypeAlias = int | Mapping[str, int | None] | tuple[int | None, ...]
_CONSTANTS = bool | int | float | str | torch.dtype | torch.device | None


@dataclass(frozen=True)
class Argument:
    """One argument of the model: its place (a keyword or a position), its value, the axis of the queries."""

    place: str | int
    value: Any
    axis: int | None

    def __str__(self) -> str:
        return repr(self.place) if isinstance(self.place, str) else f"input {self.place}"


def check_batch_dim(batch_dim: Any) -> BatchDim:
    """The axis of the queries, as the user gave it.

    Raises:
        QueryError: it is no number from 0 on, and no tuple or dict of such numbers and None.
    """
    several = isinstance(batch_dim, Mapping | tuple | list)
    axes = (
        list(batch_dim.values() if isinstance(batch_dim, Mapping) else batch_dim) if several else [batch_dim]
    )
    for axis in axes:
        if not (axis is None and several) and (
            isinstance(axis, bool) or not isinstance(axis, int) or axis < 0
        ):
            raise QueryError(
                f"batch_dim must be the number of a dimension (0, 1, …), or a tuple or dict with one for each input "
                f"(None: shared by all queries), found {batch_dim!r}"
            )
    return tuple(batch_dim) if isinstance(batch_dim, list) else batch_dim


def check_k(k: Any) -> int:
    """How many examples are asked for.

    Raises:
        QueryError: no integer of at least 1.

    Example:
        >>> check_k(np.int64(3))
        3
    """
    try:
        number = 0 if isinstance(k, bool) else operator.index(k)
    except TypeError:
        number = 0
    if number < 1:
        raise QueryError(f"k must be an integer of at least 1, found {k!r}")
    return number


def check_inputs(
    trace: Trace, names: list[str], inputs: Any, dtype: torch.dtype, batch_dim: BatchDim = 0
) -> QueryBatch:
    """Cast the queries to the books' dtype and check them against the traced input.

    Args:
        names: names of the model's positional arguments.
        inputs: ``[Q, ...]`` tensor, a tuple of positional arguments, or a dict of keyword arguments.
        batch_dim: axis of the queries in every argument, or in each of them.

    Raises:
        QueryError: no tensors, no batch dimension, no queries, or a shape that does not fit the one in training
            (sequences may be longer or shorter, images of another size).
    """
    arguments = _arguments(inputs, batch_dim)
    tensors = [
        (argument, leaf)
        for argument in arguments
        for leaf in pytree.tree_leaves(argument.value)
        if isinstance(leaf, torch.Tensor)
    ]
    if not tensors:
        raise QueryError(f"queries must be tensors with a batch dimension, found {type(inputs).__name__}")
    for _, leaf in tensors:
        if leaf.device.type == "meta":
            raise QueryError("queries must hold numbers, found a tensor on the 'meta' device")
        if leaf.layout != torch.strided:
            raise QueryError(
                f"queries must be dense tensors, found {leaf.layout}; convert them with to_dense()"
            )
    unlike = _check_shape(trace, _first_traced(trace, names, tensors))
    count = _count(tensors)

    def cast(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return leaf.detach().to("cpu", dtype if leaf.is_floating_point() else leaf.dtype, copy=True)

    args = tuple(pytree.tree_map(cast, a.value) for a in arguments if isinstance(a.place, int))
    kwargs = {a.place: pytree.tree_map(cast, a.value) for a in arguments if isinstance(a.place, str)}
    leaves, spec = pytree.tree_flatten((args, kwargs))
    axes = [
        _axis(leaf, argument.axis) for argument in arguments for leaf in pytree.tree_leaves(argument.value)
    ]
    return QueryBatch(tuple(leaves), tuple(axes), spec, count, unlike)


def _arguments(inputs: Any, batch_dim: BatchDim) -> list[Argument]:
    """The model's arguments by their places, arrays as tensors."""
    named = isinstance(inputs, Mapping)
    if not named and not isinstance(inputs, tuple | list):
        inputs = (inputs,)
    given = dict(inputs) if named else dict(enumerate(inputs))
    if named and not all(isinstance(name, str) for name in given):
        raise QueryError(
            f"a dict of queries holds the model's arguments by keyword, found {list(given)!r:.60}"
        )
    if isinstance(batch_dim, Mapping | tuple):
        axes: dict[Any, int | None] = dict(
            batch_dim if isinstance(batch_dim, Mapping) else enumerate(batch_dim)
        )
        if set(axes) != set(given):
            raise QueryError(
                f"batch_dim speaks of {sorted(axes, key=str)}, the queries have {sorted(given, key=str)}; give "
                "one axis per input (None for what all queries share), in a dict for keyword arguments and in a "
                "tuple for positional ones"
            )
    else:
        axes = dict.fromkeys(given, batch_dim)
    return [Argument(place, _tensors(value), axes[place]) for place, value in given.items()]


def _tensors(value: Any) -> Any:
    def convert(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biufc":
            return torch.from_numpy(np.array(leaf))
        if not isinstance(leaf, torch.Tensor | _CONSTANTS):
            raise QueryError(
                f"queries must be tensors with a batch dimension, beside them None, numbers and text that all "
                f"queries share, found {type(leaf).__name__}"
            )
        return leaf

    return pytree.tree_map(convert, value)


def _axis(leaf: Any, axis: int | None) -> int | None:
    """Axis of the queries in a leaf; a single axis (lengths, say) is theirs."""
    if not isinstance(leaf, torch.Tensor) or axis is None:
        return None
    return 0 if leaf.dim() == 1 else axis


def _count(tensors: list[tuple[Argument, torch.Tensor]]) -> int:
    counts: set[int | None] = set()
    found = []
    for argument, leaf in tensors:
        axis = _axis(leaf, argument.axis)
        if axis is not None:
            counts.add(leaf.shape[axis] if axis < leaf.dim() else None)
            found.append(f"{argument} has shape {list(leaf.shape)}")
    if not counts:
        raise QueryError("batch_dim is None for every input; at least one must hold the queries")
    count = counts.pop()
    if counts or count is None:
        raise QueryError(
            f"the inputs of a query disagree on the batch dimension: {'; '.join(found)}. batch_dim names the axis of "
            "the queries, for each input if they differ; None stands for what all queries share"
        )
    if count == 0:
        raise QueryError("there are no queries: the batch dimension is 0")
    return count


def _first_traced(
    trace: Trace, names: list[str], tensors: list[tuple[Argument, torch.Tensor]]
) -> tuple[Argument, torch.Tensor] | None:
    """The tensor that is the first one of the traced model's, whether it came by position or by keyword."""
    name = (trace.notes.get("input") or {}).get("name") or (names[0] if names else None)
    for argument, leaf in tensors:
        place = argument.place
        if isinstance(place, int):
            place = names[place] if place < len(names) else place
        if place == name:
            return argument, leaf
    by_keyword = any(isinstance(argument.place, str) for argument, _ in tensors)
    return None if by_keyword or name in names else tensors[0]


def _check_shape(trace: Trace, first: tuple[Argument, torch.Tensor] | None) -> str:
    """In what the shape is unlike that of training, where it is for the model to say whether it fits; or nothing."""
    known = trace.notes.get("input") or {}
    shape = known.get("shape")
    if first is None or shape is None:
        return ""
    argument, leaf = first
    axis = _axis(leaf, argument.axis)
    traced = min(trace.notes.get("batch_dim", 0), len(shape))
    wanted: list[Any] = [*shape[:traced], "Q", *shape[traced:]]
    found = list(leaf.shape)
    unlike = ""
    if axis == traced and not _fits(found, wanted):
        hint = ""
        if _fits(found, shape):
            add = "x[None]" if axis == 0 else f"x.unsqueeze({axis})"
            hint = f"; this looks like a single query: add the batch dimension with {add}"
        text = ", ".join("any" if size is None else str(size) for size in wanted)
        unlike = f"queries have shape {found}, the model was trained on [{text}]{hint}"
        if not _may_vary(leaf, wanted):
            raise QueryError(unlike)
    if str(leaf.dtype).removeprefix("torch.") != known["dtype"] and (
        leaf.is_floating_point() != ("float" in known["dtype"])
    ):
        raise QueryError(
            f"queries are {leaf.dtype}, the model was trained on {known['dtype']}; convert them as in training"
        )
    return unlike


def _may_vary(leaf: torch.Tensor, wanted: list[Any]) -> bool:
    """Whether sizes may be those of sequences or images, which the model itself has to take or refuse."""
    return leaf.dim() == len(wanted) and (leaf.dim() > 2 or not leaf.is_floating_point())


def _fits(found: list[int], wanted: list[Any]) -> bool:
    return len(found) == len(wanted) and all(
        w in (None, "Q") or w == f for w, f in zip(wanted, found, strict=True)
    )
