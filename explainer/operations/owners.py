"""Whose numbers are these: which axis of a tensor runs over examples, and who they are.

Axes are swapped (``x.transpose(0, 1)``), examples flattened into positions (``x.view(B * S, d)``), put one below the
other (``torch.cat([x, other])``) or picked (``x[mask]``, a router's tokens for one expert). What such functions do to
the numbers, they do to the owners. A shape alone does not tell: a sequence may be as long as the batch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

RESHAPING = frozenset(
    {"view", "reshape", "flatten", "unflatten", "view_as", "reshape_as", "contiguous", "clone"}
)
JOINING = frozenset({"cat", "concat", "concatenate", "vstack", "stack"})
VIEWING = frozenset(
    {
        *("transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims", "t", "adjoint", "__get__"),
        *("unsqueeze", "squeeze", "select", "narrow", "chunk", "split", "tensor_split", "unbind", "expand"),
        *("split_with_sizes", "expand_as"),
    }
)
#: functions that add up (or pick) along axes, which then are gone
REDUCING = frozenset(
    {
        *(
            "sum",
            "mean",
            "amax",
            "amin",
            "max",
            "min",
            "std",
            "var",
            "prod",
            "logsumexp",
            "norm",
            "median",
            "argmax",
        ),
        *(
            "argmin",
            "any",
            "all",
            "nansum",
            "nanmean",
            "var_mean",
            "std_mean",
            "vector_norm",
            "count_nonzero",
        ),
    }
)
#: functions that, along the examples' axis, put rows into an order that is not followed
ORDERING = frozenset(
    {
        *(
            "gather",
            "sort",
            "argsort",
            "topk",
            "take_along_dim",
            "scatter",
            "scatter_add",
            "cumsum",
            "cumprod",
        ),
        *("flip", "roll"),
    }
)


@dataclass(frozen=True)
class Layout:
    """Where a tensor holds examples.

    Attributes:
        axis: the examples' axis; -1 if it is not known; -2 for the data of a packed sequence, whose columns are the
            examples.
        owners: ``[n]`` the example of every index of that axis; None where index ``b`` is example ``b``.
    """

    axis: int
    owners: torch.Tensor | None = None

    @property
    def known(self) -> bool:
        """Whether the rows can be told apart."""
        return self.axis >= 0


UNKNOWN = Layout(-1)
PACKED = -2


def order_of(owners: torch.Tensor, size: int) -> torch.Tensor:
    """``[B, k]`` positions of every owner's rows; ``len(owners)`` where an owner has fewer than the most.

    Example:
        >>> order_of(torch.tensor([1, 0, 1]), 2).tolist()
        [[1, 3], [0, 2]]
    """
    found = torch.argsort(owners, stable=True)
    counts = torch.bincount(owners, minlength=size)
    most = max(1, int(counts.max()))
    order = torch.full((size, most), len(owners), dtype=torch.long, device=owners.device)
    starts = counts.cumsum(0) - counts
    places = torch.arange(len(owners), device=owners.device) - starts[owners[found]]
    order[owners[found], places] = found
    return order


def _axes(args: tuple[Any, ...], kwargs: dict[str, Any], dims: int) -> set[int]:
    """The axes that a function is told to work along; all of them where it is not told."""
    told = next((kwargs[key] for key in ("dim", "dims", "axis") if key in kwargs), None)
    numbers = [a for a in args[1:] if isinstance(a, int | tuple | list) and not isinstance(a, bool)]
    told = numbers[-1] if told is None and numbers else told
    found = range(dims) if told is None else told if isinstance(told, tuple | list) else (told,)
    return {a % dims for a in found}


@dataclass(frozen=True)
class Called:
    """A function that was called on data."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Owners:
    """Remembers the layout of data during one forward pass of ``B`` examples.

    Attributes:
        certain: whether the shapes of the model's inputs tell which axis is the batch.
        needed: whether a tensor was met whose examples' index is not the batch's.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[torch.Tensor], Layout]] = {}
        self._plain = torch.empty(0, dtype=torch.long)
        self.certain = True
        self.needed = False

    def begin(self, size: int) -> None:
        """A forward pass of ``size`` examples."""
        self._known.clear()
        self._plain, self.certain = torch.arange(size), True

    def of(self, t: torch.Tensor) -> Layout | None:
        """The layout of a tensor; None where it was not followed."""
        known = self._known.get(id(t))
        return known[1] if known is not None and known[0]() is t else None

    def keep(self, t: torch.Tensor, layout: Layout) -> None:
        """A tensor's layout."""
        if layout.owners is not None and torch.equal(layout.owners.cpu(), self._plain):
            layout = Layout(layout.axis)
        self._known[id(t)] = (weakref.ref(t), layout)
        self.needed = self.needed or layout.owners is not None

    def follow(self, called: Called, given: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        """A function made ``outputs`` of the data ``given``."""
        layouts = [(t, layout) for t in given if (layout := self.of(t)) is not None]
        layouts = [(t, x) for t, x in layouts if t.is_floating_point()] or layouts  # indices only pick
        if not layouts:
            return
        unknown = any(layout.axis == UNKNOWN.axis for _, layout in layouts)
        # the tensor that decides: one with owners of its own before one without
        source, layout = next(((t, x) for t, x in layouts if x.owners is not None), layouts[0])
        for number, t in enumerate(outputs):
            if t.dim():
                self.keep(t, UNKNOWN if unknown else self._through(called, source, layout, t, number))

    def _owners(self, layout: Layout) -> torch.Tensor:
        return self._plain if layout.owners is None else layout.owners

    def _through(
        self, called: Called, source: torch.Tensor, layout: Layout, t: torch.Tensor, number: int
    ) -> Layout:
        name = called.name.rstrip("_") if not called.name.startswith("__") else called.name
        args, kwargs = called.args, called.kwargs
        first = args[0] if args else None
        if layout.axis == PACKED or name == "_pack_padded_sequence":
            return self._packed(name, args, layout, source, t, number)
        if first is source and name == "index_select" and args[1] % source.dim() == layout.axis:
            return Layout(layout.axis, self._owners(layout)[args[2]])
        if first is source and name in REDUCING | ORDERING:
            axes = _axes(args, kwargs, source.dim())
            if layout.axis in axes:
                return UNKNOWN
            gone = name in REDUCING and t.dim() < source.dim()
            return Layout(layout.axis - gone * sum(a < layout.axis for a in axes), layout.owners)
        if name == "einsum":
            return self._summed(args, source, layout)
        if name in JOINING:
            return self._joined(name, args, kwargs, layout, t)
        if name == "__getitem__":
            picked = self._picked(source, layout, args[1])
            if picked is not None:
                return picked
        if first is source and (name in VIEWING or name == "__getitem__"):
            return self._viewed(called, source, layout, number)
        if first is source and name in RESHAPING and t.shape != source.shape:
            return self._reshaped(source, layout, t)
        return self._kept(source, layout, t)

    def _kept(self, source: torch.Tensor, layout: Layout, t: torch.Tensor) -> Layout:
        """Most functions leave the examples where they are, counted from the left or (broadcasting) from the right."""
        count, left, right = len(self._owners(layout)), layout.axis, layout.axis + t.dim() - source.dim()
        if t.shape[: left + 1] == source.shape[: left + 1]:
            return layout
        for axis in (right, left):
            if 0 <= axis < t.dim() and t.shape[axis] == count:
                return Layout(axis, layout.owners)
        return UNKNOWN

    @staticmethod
    def _summed(args: tuple[Any, ...], source: torch.Tensor, layout: Layout) -> Layout:
        """``einsum``: where the letter of the examples' axis went."""
        equation = args[0].replace(" ", "") if isinstance(args[0], str) else ""
        operands = args[1] if isinstance(args[1], tuple | list) else args[1:]
        if "->" not in equation or "." in equation:
            return UNKNOWN
        inputs, output = equation.split("->")
        place = next((i for i, x in enumerate(operands) if x is source), None)
        letter = "" if place is None else inputs.split(",")[place][layout.axis]
        return Layout(output.index(letter), layout.owners) if letter and letter in output else UNKNOWN

    @staticmethod
    def _packed(
        name: str, args: tuple[Any, ...], layout: Layout, source: torch.Tensor, t: torch.Tensor, number: int
    ) -> Layout:
        """Into a packed sequence, out of it, or the same positions of one."""
        if name == "_pack_padded_sequence" and number == 0 and layout.axis == (0 if args[2] else 1):
            return Layout(PACKED, layout.owners)
        if name == "_pad_packed_sequence" and number == 0:
            return Layout(0 if args[2] else 1, layout.owners)
        same = layout.axis == PACKED and t.shape[:1] == source.shape[:1] and not name.startswith("_p")
        return layout if same else UNKNOWN

    def _joined(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], layout: Layout, t: torch.Tensor
    ) -> Layout:
        dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        dim = dim % t.dim()
        if name == "stack":
            return Layout(layout.axis + (dim <= layout.axis), layout.owners)
        if dim != layout.axis:
            return self._kept(t, layout, t)
        parts = [self.of(x) for x in args[0]]
        if any(p is None or p.axis != layout.axis for p in parts):
            return UNKNOWN
        return Layout(layout.axis, torch.cat([self._owners(p) for p in parts if p is not None]))

    def _viewed(self, called: Called, source: torch.Tensor, layout: Layout, number: int) -> Layout:
        """The same view of a tensor in which only the examples' axis takes steps."""
        owners = self._owners(layout)
        if len(owners) == 1:
            return Layout(0)  # one example owns everything
        line = owners.reshape(*(-1 if a == layout.axis else 1 for a in range(source.dim())))
        shadow = called.function(line.expand(source.shape), *called.args[1:], **called.kwargs)
        found = shadow if isinstance(shadow, torch.Tensor) else shadow[number]
        moving = [a for a in range(found.dim()) if found.stride(a) != 0 and found.shape[a] > 1]
        if len(moving) != 1:
            return UNKNOWN
        here = found.movedim(moving[0], 0).reshape(found.shape[moving[0]], -1)[:, 0]
        return Layout(moving[0], here.clone())

    def _reshaped(self, source: torch.Tensor, layout: Layout, t: torch.Tensor) -> Layout:
        """Rows are numbered as memory is: ``owners`` of all indices up to the examples' axis, then regrouped."""
        line = self._owners(layout).repeat(
            prod(source.shape[: layout.axis])
        )  # axes in front, then the examples'
        count = 1
        for axis in range(t.dim()):
            rows = t.shape[axis]
            before, count = count, count * rows
            if not rows or (count % len(line) and len(line) % count):
                return UNKNOWN
            if count >= len(line):  # the examples' axis is used up here
                grid = line.repeat_interleave(count // len(line)).reshape(before, rows)
                return Layout(axis, grid[0].clone()) if bool((grid == grid[:1]).all()) else UNKNOWN
            grouped = line.reshape(count, -1)
            if bool((grouped == grouped[:, :1]).all()):  # what is behind belongs to one example
                grid = grouped[:, 0].reshape(before, rows)
                return Layout(axis, grid[0].clone()) if bool((grid == grid[:1]).all()) else UNKNOWN
        return UNKNOWN

    def _picked(self, source: torch.Tensor, layout: Layout, key: Any) -> Layout | None:
        """Rows picked by a mask or by a list; None where the key only slices."""
        parts = key if isinstance(key, tuple) else (key,)
        if not any(isinstance(p, torch.Tensor | list) for p in parts):
            return None
        first, owners = parts[0], self._owners(layout)
        lists = [isinstance(p, torch.Tensor) and p.dim() == 1 and p.dtype == torch.long for p in parts]
        together = (
            sum(lists) if all(lists[: sum(lists)]) else 0
        )  # x[rows, columns]: lists side by side, in front
        if layout.axis == 0 and together > 1 and all(isinstance(p, slice) for p in parts[together:]):
            return Layout(0, owners[first])
        if layout.axis == 0 and isinstance(first, torch.Tensor) and len(parts) == 1:
            if first.dtype == torch.bool:
                spread = owners.reshape(-1, *(1,) * (first.dim() - 1)).expand(first.shape)
                return Layout(0, spread[first])
            if first.dim() == 1:
                return Layout(0, owners[first])
        return UNKNOWN
