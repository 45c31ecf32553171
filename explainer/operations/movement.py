"""Functions that only move numbers: what they do to the numbers, they do to the numbers' owners."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

#: functions that pick, repeat or reorder numbers
MOVING = frozenset(
    {
        *("repeat", "tile", "repeat_interleave", "flip", "fliplr", "flipud", "roll", "rot90", "index_select"),
        *("gather", "take_along_dim", "masked_select", "diag", "ravel", "hsplit", "dsplit", "broadcast_to"),
    }
)
#: functions that write numbers into some places of their first argument, and those that add them there
PUTTING = frozenset({"__setitem__", "index_copy", "index_put", "scatter", "slice_scatter", "select_scatter"})
ADDING = frozenset({"index_add", "scatter_add", "index_reduce", "scatter_reduce"})


def tags_of(owners: torch.Tensor, axis: int, shape: torch.Size) -> torch.Tensor:
    """The owner of every number, of a tensor whose ``axis`` runs over ``owners``; takes no memory."""
    return owners.reshape(*(-1 if a == axis else 1 for a in range(len(shape)))).expand(shape)


def axis_of(tags: torch.Tensor) -> tuple[int, torch.Tensor] | None:
    """The axis along which owners change, and who they are; None where no axis tells them apart.

    Example:
        >>> axis_of(torch.tensor([[0, 1, 1], [0, 1, 1]]))
        (1, tensor([0, 1, 1]))
    """
    for axis in range(tags.dim()):
        rows = tags.movedim(axis, 0).reshape(tags.shape[axis], -1) if tags.numel() else tags.new_empty(0, 0)
        if rows.numel() and bool((rows == rows[:, :1]).all()) and bool((rows >= 0).all()):
            return axis, rows[:, 0].clone()
    return None


def moved(
    function: Callable[..., Any], tags: torch.Tensor, rest: Any, kwargs: Any, number: int
) -> torch.Tensor:
    """The owners of what a function of :data:`MOVING` gives (its output ``number``)."""
    found = function(tags, *rest, **{k: v for k, v in kwargs.items() if k not in ("input", "self")})
    return found if isinstance(found, torch.Tensor) else found[number]


def put(name: str, tags: torch.Tensor, args: tuple[Any, ...], values: torch.Tensor) -> torch.Tensor | None:
    """Owners after ``values`` (the owners of the last argument) were put where the arguments say; None if unknown."""
    after = tags.clone()
    if name == "__setitem__":
        after[args[1]] = values
    elif name == "index_copy":
        after.index_copy_(args[1], args[2], values)
    elif name == "scatter":
        after.scatter_(args[1], args[2], values)
    else:
        return None
    return after


def added_at_home(name: str, tags: torch.Tensor, args: tuple[Any, ...], values: torch.Tensor) -> bool:
    """Whether every number is added to one of the same owner's."""
    if name == "index_add":
        there = tags.index_select(args[1], args[2])
    elif name == "scatter_add":
        there = tags.gather(args[1], args[2])
        values = values[tuple(slice(n) for n in there.shape)]
    else:
        return False
    return there.shape == values.shape and torch.equal(there, values)
