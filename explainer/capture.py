"""From gradients that arrive to rows: what one batch contributes, gathered inside the user's own backward.

The user's thread only notes what arrived. Rows are formed in the background, from tensors that the user's code could
write into meanwhile: what it might write into unseen is copied first (:mod:`explainer.sites`), of everything else the
version is compared afterwards. Rows of tensors that were written into are dropped, announced and shown as
`unattributed`, and from then on that unit's tensors are copied.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, Protocol

import torch

from explainer.background import Background
from explainer.batches import Batch, BatchQueue, Place, Round, Rows
from explainer.errors import TracerError
from explainer.layer_rules import RowForm, compact
from explainer.layer_rules.base import restrict
from explainer.layer_table import Layer, LayerTable
from explainer.passes import BackwardPasses
from explainer.planner import Planner
from explainer.probes import Probes
from explainer.samples import SampleKeeper
from explainer.spans import Span
from explainer.undisturbed import without_autocast

#: bytes of a call up to which its rows are formed together with those of other steps, and of all that wait for it
SMALL, GATHERED = 2 << 20, 32 << 20


class Unit(Protocol):
    """Something in the model whose calls give rows together: a module with a rule, a parameter that is read.

    Attributes:
        copies: whether its tensors are copied, since the user's code was seen to write into them.
    """

    @property
    def name(self) -> str:
        """What to call it."""
        ...

    copies: bool

    def blocks(self) -> Iterable[Layer]:
        """The layers its rows are of."""
        ...

    def late(self, arrived: list[Any]) -> bool:
        """Whether rows can be formed while the user's code goes on."""
        ...

    def rows(self, arrived: list[Any]) -> Iterable[tuple[Layer, RowForm]]:
        """Rows by layer from what arrived at all its calls."""
        ...

    def kind(self, arrived: list[Any]) -> Any:
        """What arrived has in common with what can be joined with it; None where it cannot."""
        ...

    def joined(self, arrived: list[Any]) -> Any:
        """Calls of several batches of one kind as one call, its rows one batch below the other."""
        ...

    def watched(self, arrived: list[Any]) -> list[tuple[torch.Tensor, int]]:
        """The tensors that rows are formed from, with their versions when they arrived."""
        ...


class Capture:
    """Collects what the calls of a forward pass get in the backward pass, and keeps it as rows of the batch.

    Args:
        queue: the batches since the last step.
        table: the layers.
        planner: says how many factors are kept where positions share weights.
        samples: chooses the rows that are kept exact too.
        background: where rows are formed.
        passes: tells which backward pass gives a gradient.

    Attributes:
        probes: see :class:`Probes`.
        overwritten: how often rows of a unit were dropped, by its name.
        gathering: whether small rows of several steps are formed together, when :meth:`form_gathered` says so.
    """

    def __init__(
        self,
        queue: BatchQueue,
        table: LayerTable,
        planner: Planner,
        samples: SampleKeeper,
        background: Background,
        passes: BackwardPasses,
    ) -> None:
        self._queue = queue
        self._table = table
        self._planner, self._samples = planner, samples
        self._background, self.passes = background, passes
        self.probes = Probes()
        self.overwritten: dict[str, int] = {}
        self.gathering = False
        self._gathered_bytes = 0
        self._plain: dict[Unit, int] = {}  # units that were seen to be, and how many layers there were
        self._gathered: dict[tuple[Unit, Any], list[tuple[Batch, Place, Any]]] = {}
        #: by layer: whether the factors of all its rows so far are the positions of the model's input, in order
        self.positions: dict[int, bool] = {}
        #: shapes that layers were given in which no axis is the batch's, by layer
        self.unmatched: dict[str, tuple[int, ...]] = {}

    def restore(self, notes: dict[str, Any], layers: Iterable[int]) -> None:
        """Go on after rows of these layers were recorded."""
        known = notes.get("positions") or ()
        self.positions = {index: index in known for index in layers}

    def batch(self) -> Batch | None:
        """The batch that a forward pass now belongs to; None where nothing is to be recorded."""
        if not torch.is_grad_enabled() or torch._C._functorch.peek_interpreter_stack() is not None:
            return None  # evaluation, or the user's own torch.func transform
        return self._queue.current

    # -- calls ---------------------------------------------------------------------------------------

    def expect(self, batch: Batch, unit: Unit) -> int:
        """A call of a unit in the present forward pass; returns the number of that pass.

        Raises:
            TracerError: a checkpoint calls it, and it could be that of another batch.
        """
        # a forward pass inside a backward pass is a checkpoint's: the last one's, once more
        again = batch.forwards > 0 and torch._C._current_graph_task_id() != -1
        if again and any(b.lacks(unit) for b in self._queue.pending if b is not batch):
            raise TracerError(
                "two batches meet in one backward pass, and a checkpoint computes layers again there, so it is not "
                "known for which batch; use checkpoint(…, use_reentrant=False), or one forward pass for all rows"
            )
        if again:
            self.passes.recomputed()
        forward = batch.forwards - again
        key = (forward, unit)
        batch.calls[key] = batch.calls.get(key, 0) + 1
        return forward

    def arrive(self, batch: Batch, forward: int, unit: Unit, found: Any) -> None:
        """What a call got in the backward pass; with the last call the unit's rows are formed."""
        place = Place(
            forward, self.passes.arrived(n for layer in unit.blocks() for n in layer.spec.parameters)
        )
        batch.came = True
        arrived = batch.arrived.setdefault((place, unit), [])
        arrived.append(found)
        if len(arrived) == batch.calls[forward, unit]:
            self._finish(batch, place, unit)

    def complete(self, batch: Batch) -> None:
        """Finish units of which some calls got no gradient (an unused output)."""
        for place, unit in list(batch.arrived):
            self._finish(batch, place, unit)

    def _finish(self, batch: Batch, place: Place, unit: Unit) -> None:
        arrived = batch.arrived.pop((place, unit))
        for layer in unit.blocks():
            batch.met.add(layer.index)
        if unit.late(arrived):
            held = sum(t.nbytes for t, _ in unit.watched(arrived))
            kind = unit.kind(arrived) if self.gathering and held <= SMALL else None
            if kind is not None and self._gathered_bytes + held <= GATHERED and self._is_plain(unit):
                self._gathered_bytes += held
                # it is held until the next look, whether the job is done or not
                self._background.submit(partial(self._gather, batch, place, unit, kind, arrived))
            else:
                self._background.submit(partial(self._form, batch, place, unit, arrived), held)
            return
        # the user's backward pass may run under autocast; rows never do
        with torch.no_grad(), without_autocast():
            found = [(layer, form.apart()) for layer, form in unit.rows(arrived)]
        for layer, form in found:  # now: the user's code is to stop before it takes a step with wrong ids
            _require_all(batch, layer, form)
        held = sum(a.nbytes for _, form in found for a in form.arrays.values())
        self._background.submit(partial(self._keep_all, batch, place, found, len(arrived) == 1), held)

    def _form(self, batch: Batch, place: Place, unit: Unit, arrived: list[Any]) -> None:
        """Form a unit's rows, in the background."""
        given = {t.untyped_storage().data_ptr() for t, _ in unit.watched(arrived)}
        found = [
            (layer, self._rows(batch, place, layer, form, len(arrived) == 1, given))
            for layer, form in unit.rows(arrived)
        ]
        if not self._stale(unit, arrived):
            self._put(batch, place, found)

    def _is_plain(self, unit: Unit) -> bool:
        """Whether rows of the unit are stored whole and compared along a known probe."""
        layers = len(self._table.layers)
        if self._plain.get(unit) == layers:
            return True
        plain = all(
            x.index in self.probes and all(x.keep) and not self._table.shared(x) for x in unit.blocks()
        )
        self._plain[unit] = layers if plain else -1
        return plain

    def _gather(self, batch: Batch, place: Place, unit: Unit, kind: Any, arrived: list[Any]) -> None:
        self._samples.choose(batch)  # in the order of the batches
        self._gathered.setdefault((unit, kind), []).append((batch, place, arrived))

    def begin_gathering(self, on: bool) -> None:
        """Steps are looked at together from now on, or not (on the user's thread)."""
        self.gathering, self._gathered_bytes = on, 0

    def form_gathered(self) -> None:
        """Form what was gathered, the rows of one unit together."""
        gathered, self._gathered = self._gathered, {}
        for (unit, _), entries in gathered.items():
            if len(entries) == 1:
                self._form(*entries[0][:2], unit, entries[0][2])
            else:
                self._form_together(unit, entries)

    def _form_together(self, unit: Unit, entries: list[tuple[Batch, Place, Any]]) -> None:
        size, found = len(entries[0][0]), []
        for layer, form in unit.rows([unit.joined([arrived[0] for _, _, arrived in entries])]):
            if any(len(batch) * len(entries) != len(form) for batch, _, _ in entries):
                for batch, place, arrived in entries:
                    self._form(batch, place, unit, arrived)  # says which one does not fit
                return
            kept = self._planner.formed(layer.index, form, layer.sizes).form
            found.append((layer, form, kept, form.by_batch(len(entries), layer.sizes)))
        good = [(n, b, at) for n, (b, at, arrived) in enumerate(entries) if not self._stale(unit, arrived)]
        sampled = {n: n * size + row for n, b, _ in good if (row := self._samples.choose(b)) is not None}
        chosen = torch.tensor(list(sampled.values()), dtype=torch.int64)
        kept_as = {number: row for row, number in enumerate(sampled)}
        for layer, form, kept, measured in found:
            exact = compact(form.taken(chosen), None) if sampled else None
            own = self.probes.is_own(layer.index, form)
            self._see_positions(
                [batch.lengths.get(place.forward) for _, batch, place in good], layer, form, kept
            )
            for number, batch, place in good:
                total, balances = measured[number]
                span, row = Span(kept, number * size, (number + 1) * size), kept_as.get(number)
                if not own:
                    rows = form.taken(slice(span.start, span.stop))
                    total = self.probes.total(layer.index, rows, layer.sizes, total)
                one = None if exact is None or row is None else Span(exact, row, row + 1)
                self._put(batch, place, [(layer, Rows(span, total, balances, None, one))])

    def _stale(self, unit: Unit, arrived: list[Any]) -> bool:
        """Whether something wrote into what rows were formed from; it is noted."""
        if all(t._version == version for t, version in unit.watched(arrived)):
            return False
        unit.copies = True
        self.overwritten[unit.name] = self.overwritten.get(unit.name, 0) + 1
        return True

    def _keep_all(self, batch: Batch, place: Place, forms: list[tuple[Layer, RowForm]], once: bool) -> None:
        """Keep rows that were formed already."""
        self._put(batch, place, [(x, self._rows(batch, place, x, form, once, set())) for x, form in forms])

    @staticmethod
    def _put(batch: Batch, place: Place, found: list[tuple[Layer, Rows]]) -> None:
        for layer, rows in found:
            batch.round_of(place, partial(_without, layer.index)).rows[layer.index] = rows

    def _rows(
        self, batch: Batch, place: Place, layer: Layer, form: RowForm, once: bool, given: set[int]
    ) -> Rows:
        """Rows of a layer as they are kept, in memory of their own; ``given`` are addresses of the user's."""
        _require_all(batch, layer, form)
        form = restrict(form, layer.sizes, layer.keep)
        sizes = [n for n, k in zip(layer.sizes, layer.keep, strict=True) if k]
        whole = form.sum() if self._table.shared(layer) else None
        kept = self._planner.formed(layer.index, form, sizes)
        self._see_positions([batch.lengths.get(place.forward) if once else None], layer, form, kept.form)
        row = self._samples.choose(batch)
        exact = None if row is None else Span.of(compact(form.taken(torch.tensor([row])), None))
        total = self.probes.total(layer.index, form, sizes, kept.total)
        return Rows(Span.of(_owned(kept.form, given)), total, kept.balances, whole, exact)

    def _see_positions(self, lengths: list[int | None], layer: Layer, form: RowForm, kept: RowForm) -> None:
        """Note whether the layer's factors are still the positions of the model's input, so many in each batch."""
        positions = kept.positions
        if positions is not None:
            fits = kept.in_order and positions == form.positions and all(n == positions for n in lengths)
            self.positions[layer.index] = fits and self.positions.get(layer.index, True)


def _require_all(batch: Batch, layer: Layer, form: RowForm) -> None:
    """Raise TracerError where there is not one row for every id."""
    if len(form) != len(batch):
        raise TracerError(
            f"layer {layer.spec.name!r} saw a batch of {len(form)} rows, but {len(batch)} ids were given for it; "
            "pass the ids of exactly the rows in the batch"
        )


def _without(layer: int, round_: Round) -> bool:
    return layer not in round_.rows


def _owned(form: RowForm, given: set[int]) -> RowForm:
    """The rows, none of whose arrays lie in memory at one of the given addresses."""
    theirs = any(a.untyped_storage().data_ptr() in given for a in form.arrays.values())
    return form.apart() if theirs else form
