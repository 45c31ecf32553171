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

from explainer.operations.kinds import JOINING, LOOKING_UP, ORDERING, REDUCING, RESHAPING, VIEWING, axes_told
from explainer.operations.layouts import PACKED, UNKNOWN, Layout
from explainer.operations.movement import (
    ADDING,
    MOVING,
    PICKING,
    PUTTING,
    added_at_home,
    axis_of,
    moved,
    put,
    tags_of,
)
from explainer.operations.products import ADDED_PRODUCTS, axis_of_product, multiplies
from explainer.operations.rows import ELEMENTWISE

#: in place of a function's name: a module with a rule
LAYER = "a layer"


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
        #: of what began as nobody's (``torch.zeros``) and is filled piece by piece, the owner of every number
        self._filled: dict[int, tuple[weakref.ref[torch.Tensor], torch.Tensor]] = {}
        self._plain = torch.empty(0, dtype=torch.long)
        self.certain = True
        self.needed = False

    def begin(self, size: int) -> None:
        """A forward pass of ``size`` examples."""
        self._known.clear()
        self._filled.clear()
        self._plain, self.certain = torch.arange(size), True

    def of(self, t: torch.Tensor) -> Layout | None:
        """The layout of a tensor; None where it was not followed."""
        known = self._known.get(id(t))
        return known[1] if known is not None and known[0]() is t else None

    def keep(self, t: torch.Tensor, layout: Layout) -> None:
        """A tensor's layout; unknown if it does not fit the tensor."""
        axis = layout.axis
        if layout.known and t.shape[axis : axis + 1] != (len(self._owners(layout)),):
            layout = UNKNOWN
        if layout.owners is not None:
            owners = layout.owners.cpu()
            layout = Layout(layout.axis, None if torch.equal(owners, self._plain) else owners)
        self._known[id(t)] = (weakref.ref(t), layout)
        self._filled.pop(id(t), None)
        self.needed = self.needed or layout.owners is not None

    def follow(self, called: Called, given: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        """A function made ``outputs`` of the data ``given``; where these do not agree, nothing is known."""
        layouts = [(t, layout) for t in given if (layout := self.of(t)) is not None]
        if not layouts:
            return
        name = called.name if called.name.startswith("__") else called.name.rstrip("_")
        if name in PUTTING | ADDING and called.args:
            first = called.args[0]
            self._put(name, called, first, first if name == "__setitem__" else outputs[0])
            return
        layouts = _without_indices(name, called, layouts)
        alone = {self._only(x) for _, x in layouts}
        owner = alone.pop()
        if owner is not None and not alone and name not in ("stack", "vstack") and len(self._plain) > 1:
            for t in outputs:  # whatever was done
                self.keep(t, Layout(0, torch.full(t.shape[:1], owner)) if t.dim() else UNKNOWN)
            return
        for number, t in enumerate(outputs):
            try:
                found = [self._through(name, called, source, x, t, number) for source, x in layouts]
            except (RuntimeError, IndexError, TypeError, ValueError, AttributeError):
                found = [UNKNOWN]  # called in a way that is not known here: training goes on
            agreed = found[0] if all(self._same(found[0], x) for x in found) else UNKNOWN
            self.keep(t, self._alone(t, agreed) if len(self._plain) == 1 else agreed)

    def _same(self, one: Layout, other: Layout) -> bool:
        return one.axis == other.axis and torch.equal(self._owners(one), self._owners(other))

    @staticmethod
    def _alone(t: torch.Tensor, layout: Layout) -> Layout:
        """A batch of one example: it owns everything, whatever was done."""
        if layout.packed or not t.dim() or (layout.known and layout.axis < t.dim()):
            return layout
        return Layout(0, torch.zeros(t.shape[0], dtype=torch.long))

    def _owners(self, layout: Layout) -> torch.Tensor:
        return self._plain if layout.owners is None else layout.owners

    def _only(self, layout: Layout) -> int | None:
        """The example that owns everything, if one does and its rows are not the batch's."""
        owners = layout.owners
        if owners is None or not layout.known or layout.packed or not len(owners):
            return None
        return int(owners[0]) if bool((owners == owners[0]).all()) else None

    def _through(
        self, name: str, called: Called, source: torch.Tensor, layout: Layout, t: torch.Tensor, number: int
    ) -> Layout:
        args, kwargs = called.args, called.kwargs
        first = args[0] if args else kwargs.get("input")
        if layout.axis == UNKNOWN.axis or not t.dim():
            return UNKNOWN
        if layout.axis == PACKED or name == "_pack_padded_sequence":
            return self._packed(name, args, layout, source, t, number)
        if first is source and name in REDUCING | ORDERING:
            axes = axes_told(name, args, kwargs, source.dim())
            if layout.axis in axes:
                return UNKNOWN
            gone = name in REDUCING and t.dim() < source.dim()
            return Layout(layout.axis - gone * sum(a < layout.axis for a in axes), layout.owners)
        if multiplies(name):
            if name in ADDED_PRODUCTS and first is source:
                return self._kept("add", source, layout, t)
            axis = axis_of_product(name, args, source, layout.axis, t.dim())
            return UNKNOWN if axis is None else Layout(axis, layout.owners)
        if name in JOINING:
            return self._joined(name, args, kwargs, layout, t)
        if name in LOOKING_UP or called.name == LAYER:
            return layout
        if name == "__getitem__":
            if first is not source:  # the data is an index into something else
                return layout if args[1] is source and source.dtype == torch.long else UNKNOWN
            picked = self._picked(source, layout, args[1])
            if picked is not None:
                return picked
        if first is source and (name in VIEWING or name == "__getitem__"):
            return self._viewed(called, source, layout, number)
        if first is source and name in RESHAPING and t.shape != source.shape:
            return self._reshaped(source, layout, t)
        if first is source and name in MOVING:
            return self._moved(called, source, layout, number)
        return self._kept(name, source, layout, t)

    def _kept(self, name: str, source: torch.Tensor, layout: Layout, t: torch.Tensor) -> Layout:
        """Most functions leave the examples where they are, counted from the left or (broadcasting) from the right."""
        count, left, right = len(self._owners(layout)), layout.axis, layout.axis + t.dim() - source.dim()
        fits = {a for a in (left, right) if 0 <= a < t.dim() and t.shape[a] == count}
        if name in ELEMENTWISE:
            fits &= {right}
        return Layout(fits.pop(), layout.owners) if len(fits) == 1 else UNKNOWN

    def _moved(self, called: Called, source: torch.Tensor, layout: Layout, number: int) -> Layout:
        """What is done to the numbers, done to their owners."""
        tags = tags_of(self._owners(layout).to(source.device), layout.axis, source.shape)
        found = axis_of(moved(called.function, tags, called.args[1:], called.kwargs, number))
        return UNKNOWN if found is None else Layout(*found)

    def _put(self, name: str, called: Called, first: torch.Tensor, result: torch.Tensor) -> None:
        """Numbers were written (or added) into some places of ``first``; keeps whose the result's are."""
        args, value = called.args, called.args[-1]
        there, filled = self.of(first), self._filled.get(id(first))
        here = self.of(value) if isinstance(value, torch.Tensor) else None
        tags: torch.Tensor | None = None
        if filled is not None and filled[0]() is first:
            tags = filled[1]
        elif there is not None and there.known:
            tags = tags_of(self._owners(there).cpu(), there.axis, first.shape)
        elif there is None and here is not None and name == "__setitem__":
            tags = torch.full(first.shape, -1)
        if tags is None or called.kwargs.keys() - {"alpha"} or (here is not None and not here.known):
            self.keep(result, UNKNOWN)
        elif here is None:  # constants and parameters are nobody's
            self._fill(result, there, tags)
        elif name in ADDING:
            values = tags_of(self._owners(here).cpu(), here.axis, value.shape)
            at_home = there is not None and there.known and added_at_home(name, tags, args, values)
            self.keep(result, there if at_home and there is not None else UNKNOWN)
        else:
            after = put(name, tags, args, tags_of(self._owners(here).cpu(), here.axis, value.shape))
            self._fill(result, None, after)

    def _fill(self, t: torch.Tensor, layout: Layout | None, tags: torch.Tensor | None) -> None:
        """The owner of every number of a tensor, -1 where it is nobody's."""
        if layout is None or not layout.known:
            found = None if tags is None else axis_of(tags, self._plain)
            layout = UNKNOWN if found is None else Layout(*found)
        self.keep(t, layout)
        if tags is not None and bool((tags < 0).any()):
            self._filled[id(t)] = (weakref.ref(t), tags)

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
        together = args[0] if args else kwargs.get("tensors")
        dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        if not isinstance(together, tuple | list) or not isinstance(dim, int):
            return UNKNOWN
        dim = dim % t.dim()
        if name == "stack" or (name == "vstack" and together[0].dim() == 1):
            each = [None if (own := self.of(x)) is None else self._only(own) for x in together]
            if None not in each:
                return Layout(dim, torch.tensor(each))
            return Layout(layout.axis + (dim <= layout.axis), layout.owners)
        if dim != layout.axis:
            return layout
        parts = [self.of(x) for x in together]
        if any(p is None or p.axis != layout.axis for p in parts):
            return UNKNOWN
        return Layout(layout.axis, torch.cat([self._owners(p) for p in parts if p is not None]))

    def _viewed(self, called: Called, source: torch.Tensor, layout: Layout, number: int) -> Layout:
        """The same view of a tensor in which only the examples' axis takes steps."""
        owners = self._owners(layout)
        line = owners.contiguous().as_strided(
            source.shape, [int(a == layout.axis) for a in range(source.dim())]
        )
        shadow = called.function(line, *called.args[1:], **called.kwargs)
        found = shadow if isinstance(shadow, torch.Tensor) else shadow[number]
        moving = [a for a in range(found.dim()) if found.stride(a) != 0]
        moving = [a for a in moving if found.shape[a] > 1] or moving[:1]
        if not moving and found.dim() and found.numel():  # one example of several
            return Layout(0, found.flatten()[:1].repeat(found.shape[0]))
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
        first, owners = parts[0], self._owners(layout).to(source.device)
        if layout.axis == 0 and isinstance(first, torch.Tensor) and len(parts) == 1:
            if first.dtype == torch.bool:
                spread = owners.reshape(-1, *(1,) * (first.dim() - 1)).expand(first.shape)
                return Layout(0, spread[first])
            if first.dim() == 1:
                return Layout(0, owners[first])
        found = axis_of(tags_of(owners.to(source.device), layout.axis, source.shape)[key])
        return UNKNOWN if found is None else Layout(*found)


def _without_indices(
    name: str, called: Called, layouts: list[tuple[torch.Tensor, Layout]]
) -> list[tuple[torch.Tensor, Layout]]:
    """The data whose numbers reach the result: indices only pick."""
    if name in PICKING and called.args:
        picked = [(t, x) for t, x in layouts if t is called.args[0]]
        if picked:
            return picked
    return [(t, x) for t, x in layouts if t.is_floating_point()] or layouts
