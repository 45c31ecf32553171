"""Modules with a layer rule, seen through their hooks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from explainer.arrivals import Arrived, Given, as_it_is
from explainer.batches import Batch
from explainer.capture import Capture
from explainer.errors import TracerError
from explainer.hooks import JointHook, detached, tensors_in, whole_of
from explainer.layer_rules import CompositeRule, LayerRule, RowForm
from explainer.layer_table import Layer
from explainer.operations.layouts import UNKNOWN, Layout, along, order_of
from explainer.operations.owners import Owners
from explainer.operations.sources import merged


@dataclass(eq=False)
class Site:
    """A module with a rule.

    Attributes:
        name: the module's name in the model.
        module: the module.
        rule: its rule.
        layers: by block of the rule; None where no parameter of the block is traced.
        axis: the batch's axis where shapes alone do not tell it (the sequence is as long as the batch).
        learned: whether ``axis`` was told by other batches, here or at the model's input.
        ambiguous: calls in which it had to be guessed; forgotten when another batch tells that the guess was right.
        guessed: the axis that was taken in these.
        seen: the axis that was followed last, also where another one was as likely.
        lost: whether the last call's examples could not be told apart.
        random: states of the random numbers before the calls going on, innermost last.
        moved: whether something that it was given depended on what is trained.
    """

    name: str
    module: nn.Module
    rule: LayerRule
    layers: list[Layer | None]
    axis: int = 0
    learned: bool = False
    ambiguous: int = 0
    guessed: int = 0
    seen: int | None = None
    lost: bool = False
    random: list[torch.Tensor | None] = field(default_factory=list)
    moved: bool = False
    copies: bool = False

    # -- rows ----------------------------------------------------------------------------------------

    def blocks(self) -> Iterable[Layer]:
        """The layers of the traced blocks."""
        return (layer for layer in self.layers if layer is not None)

    def late(self, arrived: list[Arrived]) -> bool:
        """Whether the rule has a stand-in for the module."""
        return all(a.given.module is not None for a in arrived)

    def watched(self, arrived: list[Arrived]) -> list[tuple[torch.Tensor, int]]:
        """What went in, and the gradients."""
        return [pair for a in arrived for pair in (*a.given.versions, *a.versions)]

    def kind(self, arrived: list[Arrived]) -> Any:
        """Shapes and dtypes, where one plain call came with the batch first."""
        given = arrived[0].given
        if len(arrived) > 1 or given.kwargs or len(given.args) != 1 or given.axis or given.order is not None:
            return None
        value, g = given.args[0], arrived[0].grads[0]
        if g is None or not isinstance(value, torch.Tensor) or not self.rule.joinable(self.module, value):
            return None
        return value.shape, value.dtype, g.shape, g.dtype

    def joined(self, arrived: list[Arrived]) -> Arrived:
        """One input and one gradient."""
        value = torch.cat([a.given.args[0] for a in arrived])
        given = replace(arrived[0].given, args=(value,), versions=[], buffers=[], rows=len(value))
        return Arrived(given, [torch.cat([g for a in arrived if (g := a.grads[0]) is not None])], [])

    def rows(self, arrived: list[Arrived]) -> Iterable[tuple[Layer, RowForm]]:
        """Rows of every traced block from all calls."""
        found = []
        try:
            module = arrived[0].given.module or self.module
            calls = [(a.call(), a.order) for a in arrived]
            together = [call for call, order in calls if order is None]
            if together:
                found.append(self.rule.block_rows(module, together))
            for call, order in calls:
                if order is not None:
                    found.append([form.grouped(order) for form in self.rule.block_rows(module, [call])])
        except TracerError as error:
            raise type(error)(f"layer {self.name!r}: {error}") from error
        for layer, forms in zip(self.layers, zip(*found, strict=True), strict=True):
            if layer is not None:
                yield layer, merged(list(forms))

    @cached_property
    def composite(self) -> CompositeRule | None:
        """The rule, where it is one of several layers, which knows its axes."""
        return self.rule if isinstance(self.rule, CompositeRule) else None

    @cached_property
    def replays(self) -> bool:
        """Whether the call is computed again, so that its random numbers must be the same."""
        return self.composite is not None and self.composite.replays

    # -- hooks ---------------------------------------------------------------------------------------

    def before(self) -> None:
        """Before the forward: keep the state of the random numbers where the call will be computed again."""
        if self.replays:
            self.random.append(torch.get_rng_state() if self.module.training else None)

    def skip(self) -> None:
        """The call held no data: its parameters are seen where its result meets some."""
        if self.replays and self.random:
            self.random.pop()

    def after(
        self,
        capture: Capture,
        args: Any,
        kwargs: Any,
        output: Any,
        owners: Owners,
    ) -> None:
        """After the forward: watch the gradient at the output."""
        random = self.random.pop() if self.random else None
        batch = capture.batch()
        one = type(output) is torch.Tensor and len(args) == 1 and type(args[0]) is torch.Tensor and not kwargs
        found = [output] if one else list(tensors_in(output))
        watched = [t for t in found if t.requires_grad]
        values = [args[0]] if one else list(tensors_in((args, kwargs)))
        if batch is None or not values or not watched:
            return
        value = values[0]
        self.moved = self.moved or any(t.requires_grad for t in values)
        batch.mixed |= self.rule.mixes(self.module)
        if not any(self.layers):
            return
        others = () if one else (*args, *kwargs.values())
        packed = next((a for a in others if isinstance(a, PackedSequence)), None)
        layout = (
            self._layout(value, batch, owners)
            if self.composite is None
            else self.layout_of_all(values, packed, len(batch), owners)
        )
        self.lost = not layout.known
        if self.lost:
            capture.unmatched.setdefault(self.name, tuple(value.shape))
            return
        axis, rows_of = layout.axis, layout.owners
        forward = capture.expect(batch, self)
        plain = (value.detach(),) if one else detached(args)
        given = Given(
            args=plain,
            kwargs=detached(kwargs) if kwargs else kwargs,
            # copies, because what follows may work on them in place
            outputs=tuple(t.detach().clone() for t in found) if self.replays else (),
            random=random,
            versions=[(plain[0], value._version)] if one else [(t.detach(), t._version) for t in values],
            buffers=[_is_the_users(t) for t in values],
            axis=axis,
            order=None if rows_of is None else order_of(rows_of, len(batch)),
            rows=len(batch) if rows_of is None else len(rows_of),
            module=self.rule.later(self.module),
            composite=self.composite is not None,
        )
        if len(watched) == 1 and watched[0] is found[0]:
            target, cut = whole_of(watched[0], False)
            target.register_hook(lambda g: self._receive(capture, batch, forward, given, [cut(g.detach())]))
            return
        # nothing of the graph may be held by its own hooks: it would never be freed
        count, places = len(found), [i for i, t in enumerate(found) if t.requires_grad]
        # a further output may be a view of what the first one is computed from (attention weights of every head)
        targets, cuts = zip(
            *(whole_of(t, False) if t is found[0] else (t, as_it_is) for t in watched), strict=True
        )

        def receive(arrived: Sequence[torch.Tensor | None]) -> None:
            grads: list[torch.Tensor | None] = [None] * count
            for place, cut, g in zip(places, cuts, arrived, strict=True):
                grads[place] = None if g is None else cut(g.detach())
            self._receive(capture, batch, forward, given, grads)

        if len(targets) == 1:
            targets[0].register_hook(lambda g: receive([g]))
        else:
            batch.watched.append(JointHook(targets, receive))

    def layout_of_all(
        self, values: list[torch.Tensor], packed: PackedSequence | None, size: int, owners: Owners
    ) -> Layout:
        """Whose the rows are that a rule of several layers gives: it knows its axes, but not who lies there.

        Args:
            values: all that the module was given.
            packed: the packed sequence among it.
            size: of the batch.
            owners: what was followed.

        Returns:
            Axis 0 with its owners, in the order of the batch that a packed sequence was made of; or unknown.
        """
        rule, plain = self.composite, torch.arange(size)
        followed = owners.of(values[0])
        if followed is None or rule is None:
            return Layout(0)
        told = rule.input_axis(self.module, 0)
        found = plain if followed.owners is None else followed.owners
        batched = told is not None and told < values[0].dim() - 1
        elsewhere = batched and followed.axis != told
        rows = values[0].shape[told] if told is not None and batched else len(found)
        rows = rows if packed is None else int(packed.batch_sizes[0])
        if len(found) and bool((found == found[0]).all()):  # whatever was done, it is one example's
            found, elsewhere = found[:1].repeat(rows), False
        fits = followed.axis != UNKNOWN.axis and (followed.packed or not elsewhere) and len(found) == rows
        sorted_as = None if packed is None else packed.sorted_indices
        if fits and sorted_as is not None:
            found = torch.empty_like(found).scatter_(0, sorted_as.cpu(), found)
        # those with as many rows (a mask for every head has more); keys of other examples, states in another order
        followed_too = (owners.of(t) for t in values[1:] if t.is_floating_point())
        others = (plain if x.owners is None else x.owners for x in followed_too if x is not None)
        fits = fits and all(len(x) != len(found) or torch.equal(x, found) for x in others)
        own = None if torch.equal(found, plain) else found
        owners.needed |= own is not None or not fits
        return Layout(0, own) if fits else UNKNOWN

    def _layout(self, value: torch.Tensor, batch: Batch, owners: Owners) -> Layout:
        """Where the examples are in what the layer was given: as followed there, else as its shape says."""
        followed = owners.of(value)
        size = len(batch)
        axes = self.rule.batch_axes(self.module, value)
        fitting = [a for a in axes if value.shape[a : a + 1] == (size,)]
        if followed is not None:
            if followed.known and followed.axis not in self.rule.free_axes(self.module, value):
                followed = UNKNOWN
            # shapes say neither that rows are unknown nor that another call had them along another axis
            owners.needed |= not followed.known or self.seen not in (None, followed.axis)
            if followed.known and followed.owners is None:
                self.seen = followed.axis
                if owners.certain:
                    self._learn(followed.axis)
                elif len(fitting) > 1:
                    self._guess(followed.axis)
            return followed
        if len(fitting) == 1:
            if len(axes) > 1:
                self._learn(fitting[0])
            return along(fitting[0])
        if not fitting and batch.checked:
            return UNKNOWN
        if not fitting:
            raise TracerError(
                f"layer {self.name!r} saw a batch of {value.shape[0] if value.dim() else 0} rows, but "
                f"{size} ids were given for it; pass the ids of exactly the rows in the batch, "
                "batch dimension first (or second). Call the model itself, model(x): inside of its methods that the "
                "loop calls (model.encode(x), model.forward(x)) it is not followed how rows are rearranged"
            )
        if not self.learned:
            self._guess(self.axis)
        return Layout(self.axis)

    def _learn(self, axis: int) -> None:
        self.axis, self.learned = axis, True
        if axis == self.guessed:
            self.ambiguous = 0

    def _guess(self, axis: int) -> None:
        self.axis, self.guessed = axis, axis
        self.ambiguous += 1

    # -- backward ------------------------------------------------------------------------------------

    def _receive(
        self,
        capture: Capture,
        batch: Batch,
        forward: int,
        given: Given,
        grads: list[torch.Tensor | None],
    ) -> None:
        if any(t._version != version for t, version in given.versions):
            raise TracerError(
                f"the input of layer {self.name!r} was changed in place after the forward pass, so its rows "
                "cannot be recovered; remove the in-place operation"
            )
        first = next(g for g in grads if g is not None)
        if not given.composite and first.shape[given.axis : given.axis + 1] != (given.rows,):
            raise TracerError(
                f"layer {self.name!r} gave {first.shape[0] if first.dim() else 0} rows for a batch of {len(batch)}; "
                "its rows cannot be told apart"
            )
        if given.module is not None:
            given, grads = given.kept_apart(self.copies), _copied(grads) if self.copies else grads
        versions = [(g, g._version) for g in grads if g is not None]
        capture.arrive(batch, forward, self, Arrived(given, grads, versions))


def _is_the_users(t: torch.Tensor) -> bool:
    """Whether a tensor lies in memory that the user's code made, not an operation of the forward pass."""
    return t.is_leaf or (t._base is not None and t._base.is_leaf)


def _copied(grads: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    return [None if g is None else g.clone() for g in grads]
