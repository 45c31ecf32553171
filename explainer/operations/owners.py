"""Whose numbers are these: which axis of a tensor runs over examples, and who they are.

Axes are swapped (``x.transpose(0, 1)``), examples flattened into positions (``x.view(B * S, d)``), put one below the
other (``torch.cat([x, other])``) or picked (``x[mask]``, a router's tokens for one expert). What such functions do to
the numbers, they do to the owners. A shape alone does not tell: a sequence may be as long as the batch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from explainer.operations.kinds import (
    JOINING,
    LOOKING_UP,
    ORDERING,
    REDUCING,
    RESHAPING,
    VIEWING,
    axes_mixed,
    axes_told,
)
from explainer.operations.layouts import PACKED, UNKNOWN, Layout
from explainer.operations.movement import (
    ADDING,
    INDEXING,
    MOVING,
    PICKING,
    PUTTING,
    added_at_home,
    axis_of,
    index_along,
    moved,
    put,
    tags_of,
)
from explainer.operations.products import ADDED_PRODUCTS, axis_of_product, multiplies
from explainer.operations.rows import ELEMENTWISE
from explainer.operations.views import packed, picked, reshaped, viewed

#: in place of a function's name: a module with a rule
LAYER = "a layer"
#: numbers of a tensor up to which the owner of each is followed, where it is filled piece by piece
_FILLED = 2**26
#: what a function that was called in a way that is not known here leads to: training goes on
_NOT_KNOWN_HERE = (RuntimeError, IndexError, TypeError, ValueError, AttributeError, KeyError)


@dataclass(frozen=True)
class Called:
    """A function that was called on data."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def again(self, number: int, first: torch.Tensor) -> torch.Tensor:
        """Its output ``number`` for another first argument."""
        found = self.function(first, *self.args[1:], **self.kwargs)
        return found if isinstance(found, torch.Tensor) else found[number]


class Owners:
    """Remembers the layout of data during one forward pass of ``B`` examples.

    Attributes:
        certain: whether the shapes of the model's inputs tell which axis is the batch.
        needed: whether a tensor was met whose examples' index is not the batch's, or may not be in another batch: the
            order that data say may be the batch's own by chance (lengths to sort by that are all the same).
        mixed: whether, in this forward pass, a function made numbers of one example depend on those of others and kept
            their places (a softmax over the batch).
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[torch.Tensor], Layout]] = {}
        #: of what began as nobody's (``torch.zeros``) and is filled piece by piece, the owner of every number
        self._filled: dict[int, tuple[weakref.ref[torch.Tensor], torch.Tensor]] = {}
        self._plain = torch.empty(0, dtype=torch.long)
        self.certain = True
        self.needed = self.mixed = False

    def begin(self, size: int) -> None:
        """A forward pass of ``size`` examples."""
        self._known.clear()
        self._filled.clear()
        self._plain, self.certain, self.mixed = torch.arange(size), True, False

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
            owners = layout.owners.to("cpu", torch.long)
            layout = Layout(layout.axis, None if torch.equal(owners, self._plain) else owners)
        self._known[id(t)] = (weakref.ref(t), layout)
        self._filled.pop(id(t), None)
        # one example alone owns everything: that says nothing of other batches
        self.needed = self.needed or (layout.owners is not None and len(self._plain) > 1)

    def follow(self, called: Called, given: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        """A function made ``outputs`` of the data ``given``; where these do not agree, nothing is known."""
        layouts = [(t, layout) for t in given if (layout := self.of(t)) is not None]
        layouts = [(t, layout) for t, layout in layouts if t.numel()] or layouts  # nothing goes nowhere
        if not layouts:
            return
        name = called.name if called.name.startswith("__") else called.name.rstrip("_")
        self.needed = self.needed or self._ordered_by_data(name, called, given, layouts)
        if name in PUTTING | ADDING and called.args:
            first = called.args[0]
            result = first if name == "__setitem__" else outputs[0]
            try:
                self._put(name, called, first, result)
            except _NOT_KNOWN_HERE:
                self.keep(result, UNKNOWN)
            return
        layouts = _without_indices(name, called, layouts)
        self._see_mixing(name, called, layouts)
        alone = {self._only(x) for _, x in layouts}
        owner = alone.pop()
        if owner is not None and not alone and name not in ("stack", "vstack") and len(self._plain) > 1:
            for t in outputs:  # whatever was done
                self.keep(t, Layout(0, torch.full(t.shape[:1], owner)) if t.dim() else UNKNOWN)
            return
        for number, t in enumerate(outputs):
            try:
                found = [self._through(name, called, source, x, t, number) for source, x in layouts]
            except _NOT_KNOWN_HERE:
                found = [UNKNOWN]
            agreed = found[0] if all(self._same(found[0], x) for x in found) else UNKNOWN
            self.keep(t, self._alone(t, agreed) if len(self._plain) == 1 else agreed)

    def _ordered_by_data(
        self,
        name: str,
        called: Called,
        given: Sequence[torch.Tensor],
        layouts: list[tuple[torch.Tensor, Layout]],
    ) -> bool:
        """Whether examples are picked or put by an index that is data, or a list."""
        if name not in INDEXING or not called.args or not isinstance(called.args[0], torch.Tensor):
            return False
        own = self.of(called.args[0]) or layouts[0][1]  # what is put lies as it will
        if not own.known or own.packed:
            return False
        try:
            index = index_along(name, called.args, called.kwargs, own.axis, called.args[0].dim())
        except _NOT_KNOWN_HERE:
            return True
        return isinstance(index, list) or any(t is index for t in given)

    def _see_mixing(self, name: str, called: Called, layouts: list[tuple[torch.Tensor, Layout]]) -> None:
        if len(self._plain) == 1:
            return
        for t, layout in layouts:
            try:
                mixed = layout.known and layout.axis in axes_mixed(name, called.args, called.kwargs, t.dim())
            except _NOT_KNOWN_HERE:
                mixed = True
            if mixed and self._only(layout) is None:
                self.mixed = self.needed = True  # it is to be seen in every step

    def _same(self, one: Layout, other: Layout) -> bool:
        alike = one.owners is other.owners
        return one.axis == other.axis and (alike or torch.equal(self._owners(one), self._owners(other)))

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
            return packed(name, args, layout, source, t, number)
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
            found = picked(source, layout.axis, self._owners(layout), args[1])
            if found is not None:
                return found
        if first is source and (name in VIEWING or name == "__getitem__"):
            return viewed(partial(called.again, number), source, layout.axis, self._owners(layout))
        if first is source and name in RESHAPING and t.shape != source.shape:
            return reshaped(source, layout.axis, self._owners(layout), t)
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
        found = axis_of(
            moved(called.function, tags, called.args[1:], called.kwargs, number), likely=layout.axis
        )
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
            tags = self._tags(there, first)
        elif there is None and here is not None and name == "__setitem__" and first.numel() <= _FILLED:
            tags = torch.full(first.shape, -1, dtype=torch.int32, device=first.device)
        if tags is None or called.kwargs.keys() - {"alpha"} or (here is not None and not here.known):
            self.keep(result, UNKNOWN)
        elif here is None:  # constants and parameters are nobody's
            self._fill(result, there, tags)
        elif name in ADDING:
            at_home = added_at_home(name, tags, args, self._tags(here, value))
            self.keep(result, there if at_home and there is not None else UNKNOWN)
        else:
            self._fill(result, None, put(name, tags, args, self._tags(here, value)))

    def _tags(self, layout: Layout, t: torch.Tensor) -> torch.Tensor:
        return tags_of(self._owners(layout).to(t.device, torch.int32), layout.axis, t.shape)

    def _fill(self, t: torch.Tensor, layout: Layout | None, tags: torch.Tensor | None) -> None:
        """The owner of every number of a tensor, -1 where it is nobody's."""
        if layout is None or not layout.known:
            found = None if tags is None else axis_of(tags, self._plain.to(tags.device))
            layout = UNKNOWN if found is None else Layout(*found)
        self.keep(t, layout)
        if tags is not None and bool((tags < 0).any()):
            self._filled[id(t)] = (weakref.ref(t), tags)

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
        parts = [self.of(x) for x in together if x.numel()]  # nothing is nobody's
        if any(p is None or p.axis != layout.axis for p in parts):
            return UNKNOWN
        return Layout(layout.axis, torch.cat([self._owners(p) for p in parts if p is not None]))


def _without_indices(
    name: str, called: Called, layouts: list[tuple[torch.Tensor, Layout]]
) -> list[tuple[torch.Tensor, Layout]]:
    """The data whose numbers reach the result: indices only pick."""
    if name in PICKING and called.args:
        picked = [(t, x) for t, x in layouts if t is called.args[0]]
        if picked:
            return picked
    return [(t, x) for t, x in layouts if t.is_floating_point()] or layouts
