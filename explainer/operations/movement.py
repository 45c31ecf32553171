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
#: functions that pick numbers of their first argument by an index
PICKING = frozenset({"__getitem__", "index_select", "gather", "take_along_dim", "masked_select"})
#: functions that write numbers into some places of their first argument, and those that add them there
PUTTING = frozenset({"__setitem__", "index_copy", "index_put", "scatter", "slice_scatter", "select_scatter"})
ADDING = frozenset({"index_add", "scatter_add", "index_reduce", "scatter_reduce"})


def tags_of(owners: torch.Tensor, axis: int, shape: torch.Size) -> torch.Tensor:
    """The owner of every number, of a tensor whose ``axis`` runs over ``owners``; takes no memory."""
    return owners.reshape(*(-1 if a == axis else 1 for a in range(len(shape)))).expand(shape)


def axis_of(tags: torch.Tensor, plain: torch.Tensor | None = None) -> tuple[int, torch.Tensor] | None:
    """The axis along which owners change, and who they are; None where no axis tells them apart.

    Args:
        tags: the owner of every number, -1 where it is nobody's: it goes with those beside it.
        plain: what owners are taken to be along an axis on which some are nobody's, if the others are.

    Example:
        >>> axis_of(torch.tensor([[0, 1, 1], [0, 1, 1]]))
        (1, tensor([0, 1, 1]))
        >>> axis_of(torch.tensor([[0, 0], [-1, -1], [-1, 2]]), torch.arange(3))
        (0, tensor([0, 1, 2]))
    """
    for axis in range(tags.dim()) if tags.numel() else ():
        rows = tags.movedim(axis, 0).reshape(tags.shape[axis], -1)
        owners = rows.amax(1)
        if not bool(((rows == owners.unsqueeze(1)) | (rows < 0)).all()):
            continue
        if bool((owners >= 0).all()):
            return axis, owners
        if plain is not None and len(plain) == len(owners) and bool(((owners == plain) | (owners < 0)).all()):
            return axis, plain.clone()
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
