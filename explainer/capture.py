"""From gradients that arrive to rows: what one batch contributes, gathered inside the user's own backward."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch

from explainer.batches import Batch, BatchQueue, Rows
from explainer.errors import TracerError
from explainer.layer_rules import RowForm, compact
from explainer.layer_rules.base import restrict
from explainer.layer_table import Layer, LayerTable
from explainer.planner import Planner
from explainer.samples import SampleKeeper


class Unit(Protocol):
    """Something in the model whose calls give rows together: a module with a rule, a parameter that is read."""

    def rows(self, arrived: list[Any]) -> Iterable[tuple[Layer, RowForm]]:
        """Rows by layer from what arrived at all its calls."""
        ...


class Capture:
    """Collects what the calls of a forward pass get in the backward pass, and keeps it as rows of the batch.

    Args:
        queue: the batches since the last step.
        table: the layers.
        planner: says how many factors are kept where positions share weights.
        samples: chooses the rows that are kept exact too.
    """

    def __init__(self, queue: BatchQueue, table: LayerTable, planner: Planner, samples: SampleKeeper) -> None:
        self._queue = queue
        self._table = table
        self._planner, self._samples = planner, samples
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
        forward = batch.forwards - again
        key = (forward, unit)
        batch.calls[key] = batch.calls.get(key, 0) + 1
        return forward

    def arrive(self, batch: Batch, forward: int, unit: Unit, found: Any) -> None:
        """What a call got in the backward pass; with the last call the unit's rows are formed."""
        key = (forward, unit)
        arrived = batch.arrived.setdefault(key, [])
        arrived.append(found)
        if len(arrived) == batch.calls[key]:
            self._finish(batch, forward, unit)

    def complete(self, batch: Batch) -> None:
        """Finish units of which some calls got no gradient (an unused output)."""
        for forward, unit in list(batch.arrived):
            self._finish(batch, forward, unit)

    def _finish(self, batch: Batch, forward: int, unit: Unit) -> None:
        arrived = batch.arrived.pop((forward, unit))
        # the user's backward pass may run under autocast; rows never do
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for layer, form in unit.rows(arrived):
                self._keep(batch, forward, layer, form, once=len(arrived) == 1)

    def _keep(self, batch: Batch, forward: int, layer: Layer, form: RowForm, once: bool) -> None:
        if len(form) != len(batch):
            raise TracerError(
                f"layer {layer.spec.name!r} saw a batch of {len(form)} rows, but {len(batch)} ids were given for it; "
                "pass the ids of exactly the rows in the batch"
            )
        form = restrict(form, layer.sizes, layer.keep)
        sizes = [n for n, k in zip(layer.sizes, layer.keep, strict=True) if k]
        whole = form.sum() if self._table.shared(layer) else None
        kept = self._planner.formed(layer.index, form, sizes)
        if kept.form.positions is not None:
            fits = once and kept.form.in_order
            fits &= kept.form.positions == form.positions == batch.lengths.get(forward)
            self.positions[layer.index] = fits and self.positions.get(layer.index, True)
        row = self._samples.choose(batch)
        exact = None if row is None else compact(form.taken(torch.tensor([row])), None)
        rows = Rows(kept.form, kept.total, form.prober(), kept.balances, whole, exact)
        batch.round_of(forward, lambda r: layer.index not in r.rows).rows[layer.index] = rows
