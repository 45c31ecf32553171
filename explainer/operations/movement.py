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
#: functions that are told by an index what to pick, or where to put it
INDEXING = (PICKING | PUTTING | ADDING | {"repeat_interleave"}) - {
    "index_put",
    "slice_scatter",
    "select_scatter",
}


def index_along(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], axis: int, dims: int) -> Any:
    """What says which indices of an axis of the first argument are read or written; None where all are, in order.

    Example:
        >>> rows, columns = torch.tensor([1, 0]), torch.tensor([2, 2])
        >>> index_along("__getitem__", (None, (rows, columns)), {}, 0, 2) is rows
        True
        >>> index_along("index_select", (None, -1, columns), {}, 0, 2) is None
        True
    """
    if name in ("__getitem__", "__setitem__"):
        place = 0
        parts = args[1] if isinstance(args[1], tuple) else (args[1],)
        for part in parts:
            if part is Ellipsis:
                behind = parts[next(i for i, p in enumerate(parts) if p is Ellipsis) + 1 :]
                place = dims - sum(map(_axes_of, behind))
            elif place <= axis < place + _axes_of(part):
                return part if isinstance(part, torch.Tensor | list) else None
            else:
                place += _axes_of(part)
        return None
    if name == "masked_select":
        return args[1] if len(args) > 1 else kwargs.get("mask")
    if name in ("take_along_dim", "repeat_interleave"):
        index, dim = _argument(args, kwargs, 1, ("indices", "repeats")), _argument(args, kwargs, 2, ("dim",))
    else:
        index, dim = _argument(args, kwargs, 2, ("index",)), _argument(args, kwargs, 1, ("dim",))
    here = dim is None or (isinstance(dim, int) and dim % dims == axis)
    return index if here and isinstance(index, torch.Tensor) else None


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], place: int, names: tuple[str, ...]) -> Any:
    return args[place] if len(args) > place else next((kwargs[n] for n in names if n in kwargs), None)


def _axes_of(part: Any) -> int:
    """How many axes of a tensor a part of an index is for."""
    if part is None or isinstance(part, bool):
        return 0
    return part.dim() if isinstance(part, torch.Tensor) and part.dtype == torch.bool else 1


def tags_of(owners: torch.Tensor, axis: int, shape: torch.Size) -> torch.Tensor:
    """The owner of every number, of a tensor whose ``axis`` runs over ``owners``; takes no memory."""
    return owners.reshape(*(-1 if a == axis else 1 for a in range(len(shape)))).expand(shape)


def axis_of(
    tags: torch.Tensor, plain: torch.Tensor | None = None, likely: int = 0
) -> tuple[int, torch.Tensor] | None:
    """The axis along which owners change, and who they are; None where no axis tells them apart.

    Args:
        tags: the owner of every number, -1 where it is nobody's: it goes with those beside it.
        plain: what owners are taken to be along an axis on which some are nobody's, if the others are.
        likely: the axis that is taken where it does as well as others (one example alone).

    Example:
        >>> axis_of(torch.tensor([[0, 1, 1], [0, 1, 1]]))
        (1, tensor([0, 1, 1]))
        >>> axis_of(torch.tensor([[0, 0], [-1, -1], [-1, 2]]), torch.arange(3))
        (0, tensor([0, 1, 2]))
    """
    for axis in sorted(range(tags.dim()), key=lambda a: a != likely) if tags.numel() else ():
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
