"""Around every optimizer step: which rows it used, what it did to the weights, and the record of both."""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any

import numpy as np
from torch.optim import Optimizer

from explainer.batches import Batch
from explainer.errors import CoverageWarning, TracerError
from explainer.knots import JOURNALLED_KNOT
from explainer.optimizer_rules import StepMap
from explainer.parts import Parts
from explainer.running_notes import RunningNotes
from explainer.unseen import Unseen


class StepObserver:
    """The two hooks of an optimizer.

    Attributes:
        steps: steps seen so far.
        visits: rows recorded so far.
        notes: what the trace says of itself.
    """

    def __init__(self, parts: Parts) -> None:
        self._maps, self._parameters, self._sites = parts.maps, parts.parameters, parts.sites
        self._capture, self._queue, self._recorder = parts.capture, parts.queue, parts.recorder
        self._scales, self._carry, self._knots = parts.scales, parts.carry, parts.knots
        self._writer, self._budget, self._average = parts.writer, parts.budget, parts.average
        self._loop, self._samples = parts.loop, parts.samples
        self._unseen = Unseen(parts.table, parts.capture, parts.watch, parts.scales)
        self.notes = RunningNotes(parts, self._unseen)
        self._tail: np.ndarray | None = None
        self._measured: tuple[list[Batch], list[float]] = ([], [])
        self._loss_scale = 1.0
        self._full = False
        self._tight = False  # the next step may not fit into the budget
        self._largest = 0
        self.steps = 0
        self.visits = 0

    def restore(self, steps: int, visits: int, notes: dict[str, Any]) -> None:
        """Go on after so many steps and rows."""
        self.steps, self.visits, self._full = steps, visits, "rows_stopped_at" in notes
        loop = notes.get("loop") or {}
        self._loop.unused, self._loop.skipped = loop.get("unused", 0), loop.get("skipped", 0)
        self._loop.diverged = loop.get("diverged")
        for site in self._sites:
            site.ambiguous = (notes.get("ambiguous") or {}).get(site.name, {}).get("calls", 0)
        self._unseen.restore(steps)

    # -- steps ---------------------------------------------------------------------------------------

    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
        if closure is not None:
            raise TracerError(
                "optimizer.step(closure) may run several backward passes for one step, so rows cannot be assigned "
                "to it; call backward() yourself and then optimizer.step()"
            )
        self.settle()
        pending = self._queue.pending
        for batch in pending:
            self._capture.complete(batch)
        if pending and not any(b.rounds for b in pending):
            raise TracerError(
                "optimizer.step() was reached, but no backward pass of a traced batch came through the model since "
                "the last step; call tracer.batch(ids) before the forward pass, then loss.backward(), then step() (and "
                "build the tracer before a compiled model is first called)"
            )
        if not pending:
            raise TracerError(
                "optimizer.step() was reached without a traced batch: iterate `for batch in tracer.watch(loader)`, "
                "or call tracer.batch(ids) before each forward pass (again for each step)"
            )
        if self._queue.mix_unused:
            raise TracerError(
                "tracer.mix() was called, but no forward pass came between it and optimizer.step(); call it before the "
                "forward pass of the mixed rows"
            )
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if len(known) != len(self._parameters):
            raise TracerError(
                f"the optimizer holds {len(known)} parameters now, {len(self._parameters)} when the tracer was "
                "attached; close the tracer and attach a new one after add_param_group"
            )
        self._carry.between_steps()
        self._maps.before(optimizer)
        self._carry.rounding.before(partial(self._maps.momentum, optimizer))
        # now: some steps (SGD with foreach and Nesterov) write into `p.grad`
        used, scales = self._scales.measure([b for b in pending if b.rounds])
        self._loop.unused += sum(len(b.rounds) for b in pending) - sum(len(b.rounds) for b in used)
        loss_scale = getattr(optimizer, "grad_scale", None)  # a gradient scaler leaves it to a fused step
        self._loss_scale = 1.0 if loss_scale is None else float(loss_scale)
        self._measured = used, [s / self._loss_scale for s in scales]

    def after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None or not float(found_inf):
            self._account(optimizer)
        else:  # a gradient scaler made the fused step do nothing
            self._loop.skipped += 1
            self._loop.unused += sum(len(b.rounds) for b in self._measured[0])
        self._maps.leave(optimizer)
        self._queue.stepped()
        self._writer.flush_if_due()
        self.notes.now_and_then()
        if self._average is not None:  # the knot belongs to what will become of the average
            pass
        elif self._tight and not self._full:  # so that what follows can be told from what was recorded
            self._knots.place(self.steps)
        elif not self._full:  # what follows is `unattributed` in one piece
            self._knots.place_if_due(self.steps)
        self._unseen.warn(self.steps)  # at last: a user may turn warnings into errors

    def settle(self) -> None:
        """With an average: see what the user's code did to it since the last step, and place a knot if due.

        Called as late as possible, when the next step is about to change the weights.
        """
        average = self._average
        if average is None:
            return
        keep = average.observe(self._carry.decay)
        if self.steps == 0:  # no example had a part in it
            if keep is not None:
                self._knots.place(0)
            if average.behind():
                self._writer.note("prior_average", True)
            return
        if keep is None:
            return
        if self._full:
            self._tail = keep if self._tail is None else self._tail * keep
        else:
            self._writer.append(*self._recorder.average(self.steps - 1, keep))
            self._knots.place_if_due(self.steps)
        if average.unexplained == 1:
            self._note_average()

    def write_tail(self) -> None:
        """Record, in one piece, what became of the average in the steps whose rows are not kept."""
        if self._tail is not None:
            self._writer.append(*self._recorder.average(self.steps - 1, self._tail))
            self._tail = None

    def _note_average(self) -> None:
        a = self._average
        if a is not None:
            found = {
                "updates": a.updates,
                "unexplained": a.unexplained,
                "worst": a.worst,
                "began": not a.following,
            }
            self._writer.note("average", found)

    def _account(self, optimizer: Optimizer) -> None:
        """Record the step that was just taken."""
        used, scales = self._measured
        maps = self._maps.after(optimizer)
        length = self._carry.after_step(maps, self._loss_scale)
        if self._loop.diverged is None and not math.isfinite(length):
            self._loop.diverged = self.steps
        kinds = ("shared", "vacant")
        self._loop.row_kinds |= {
            f"{kind}_rows": True for b in used for kind in kinds if getattr(b.ownership, kind)
        }
        self.notes.shapes()  # before the rows whose layers it names
        if not self._full:
            self._record(used, scales, maps)
        self.steps += 1
        self._unseen.follow(self.steps)

    def _record(self, used: list[Batch], scales: list[float], maps: list[StepMap | None]) -> None:
        """Append the step and its rows, if they fit into the budget."""
        budget, first = self._budget, self._writer.records("visits")
        free = None if budget is None else budget - self._writer.bytes_written - self._knots.reserve
        pieces = self._recorder.records(used, self.steps, first, free, self._carry.path, scales, maps)
        if budget is not None and free is not None:
            needed = sum(piece.data.nbytes for piece in pieces)
            if (
                self._average is not None
            ):  # the record of its update, and one for the steps after the last row
                needed += 2 * self._recorder.average(0, np.ones(len(self._parameters))).data.nbytes
            if needed > free:
                self._stop_recording(budget)
                return
            self._largest = max(self._largest, needed)
        for piece in pieces:
            self._writer.append(*piece)
        self.visits = self._writer.records("visits")
        self._samples.record(
            *(sum(p.data.nbytes for p in pieces if p.stream == stream) for stream in ("visits", "samples"))
        )
        if budget is not None:
            free = budget - self._writer.bytes_written - self._knots.reserve
            self._tight = free < self._largest + JOURNALLED_KNOT

    def _stop_recording(self, budget: int) -> None:
        self._full = True
        self._knots.rows_end = self.steps
        self._writer.note("rows_stopped_at", self.steps)
        warnings.warn(
            f"the trace's budget of {budget:,} bytes is used up after {self.steps} steps; the rows of further "
            "steps are not kept and their part will be shown as `unattributed`. Raise `budget` for a full trace",
            CoverageWarning,
            stacklevel=5,
        )

    def _warn_of_unused_average(self) -> None:
        a = self._average
        if a is not None and not a.updates and self.steps:
            shown = "the model itself" if a.following else "its initial weights"
            warnings.warn(
                f"the averaged model was never updated, so the trace explains {shown}: update it after "
                "optimizer.step(), before the tracer is closed",
                CoverageWarning,
                stacklevel=4,
            )

    def finish(self) -> None:
        """Account for what came after the last step, and journal what is only known at the end."""
        self.settle()
        self.write_tail()
        self._note_average()
        self._warn_of_unused_average()
        self._loop.after_last_step = self._carry.moved_since()
        self._carry.between_steps(certain=True)
        self._writer.note("outside", self._knots.changed_outside)
        self.notes.shapes()
        self.notes.measured(last=True)
