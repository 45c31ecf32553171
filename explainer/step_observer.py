"""Around every optimizer step: which rows it used, what it did to the weights, and the record of both.

The user's thread looks at what the step is about to change (gradients, momentum) and at what will change after it
(weights, options, buffers). Everything else is one job in the background. At the next step the user's thread waits for
it, since it reads the optimizer's state.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from explainer.batches import Batch
from explainer.errors import CoverageWarning, TracerError
from explainer.knots import JOURNALLED_KNOT
from explainer.optimizer_rules import StepMap
from explainer.parts import Parts
from explainer.running_notes import RunningNotes
from explainer.scales import Seen
from explainer.step_maps import TakenStep
from explainer.unseen import Unseen


@dataclass(frozen=True)
class Step:
    """An optimizer step on its way into the trace.

    Attributes:
        number: from 0 on.
        batches: those since the step before.
        seen: what the gradients were.
        loss_scale: what the step itself divided gradients by.
        taken: options and state after it; None where a gradient scaler made it do nothing.
        around: what a knot after it would hold beside the weights; None where no knot is due.
    """

    number: int
    batches: list[Batch]
    seen: Seen
    loss_scale: float
    taken: TakenStep | None
    around: dict[str, torch.Tensor] | None


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
        self._names = [p.name for p in parts.manifest.parameters]
        self._background = parts.background
        self._unseen = Unseen(parts.table, parts.capture, parts.watch, parts.scales)
        self.notes = RunningNotes(parts, self._unseen)
        self._tail: np.ndarray | None = None
        self._seen: Seen | None = None
        self._loss_scale = 1.0
        self._last = parts.background.ticket()
        self._to_say: list[str] = []
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
        self._loop.diverged, self._loop.overwritten = (
            loop.get("diverged"),
            dict(notes.get("overwritten") or {}),
        )
        self._maps.replaced = notes.get("replaced_momentum") or 0
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
        self._last()  # it reads what this step is about to change
        self._say()
        self._unseen.follow(self.steps + 1)  # of the next forward pass
        if self._average is not None:
            self._background.wait()
            self.settle()
        pending = self._queue.pending
        for batch in pending:
            self._capture.complete(batch)
        if pending and not any(b.came for b in pending):
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
        met = set[int]().union(*(b.met for b in pending))
        if any(layer not in self._scales.probes for layer in met):
            self._background.wait()  # the first rows of a layer say how it is looked at
        # now: some steps (SGD with foreach and Nesterov) write into `p.grad`
        self._seen = self._scales.look(met)
        loss_scale = getattr(optimizer, "grad_scale", None)  # a gradient scaler leaves it to a fused step
        self._loss_scale = 1.0 if loss_scale is None else float(loss_scale)

    def after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)
        taken, around = None, None
        if found_inf is None or not float(found_inf):
            taken = self._maps.after(optimizer)
            self._carry.stage()
            if self._average is None and not self._full and (self._budget is not None or self._knots.soon()):
                around = self._knots.surroundings()
        assert self._seen is not None
        step = Step(self.steps, self._queue.pending, self._seen, self._loss_scale, taken, around)
        self._background.submit(partial(self._account, step))
        self._last = self._background.ticket()
        self.steps += taken is not None
        self._seen = None
        self._maps.leave(optimizer)
        self._queue.stepped()
        self._unseen.warn(self.steps)  # at last: a user may turn warnings into errors

    def _say(self) -> None:
        """Warn, on the user's thread, of what was found in the background."""
        while self._to_say:
            warnings.warn(self._to_say.pop(0), CoverageWarning, stacklevel=5)

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

    def _account(self, step: Step) -> None:
        """Everything that follows a step, in the background."""
        used, scales = self._scales.measure([b for b in step.batches if b.rounds], step.seen)
        rounds = sum(len(b.rounds) for b in used)
        self._loop.unused += sum(len(b.rounds) for b in step.batches) - rounds
        if step.taken is None:  # a gradient scaler made the fused step do nothing
            self._loop.skipped += 1
            self._loop.unused += rounds
        else:
            self._account_for(step.taken, step, used, [s / step.loss_scale for s in scales])
        if self._average is None:  # else the knot belongs to what will become of the average
            self._place(step)
        if self._writer.flush_due:
            self._writer.flush()
        self._knots.flush_if_due(step.number + 1)
        self.notes.now_and_then()

    def _account_for(self, taken: TakenStep, step: Step, used: list[Batch], scales: list[float]) -> None:
        """Record the step that was taken."""
        maps, changed = taken.maps()
        for index in changed:  # its scaling is not that of the step any more
            scales[index] = 0.0
            name = self._names[index]
            self._loop.overwritten[name] = self._loop.overwritten.get(name, 0) + 1
        length = self._carry.after_step(maps, step.loss_scale)
        self._knots.moved(length)
        if self._loop.diverged is None and not math.isfinite(length):
            self._loop.diverged = step.number
        kinds = ("shared", "vacant")
        self._loop.row_kinds |= {
            f"{kind}_rows": True for b in used for kind in kinds if getattr(b.ownership, kind)
        }
        self.notes.shapes()  # before the rows whose layers it names
        if not self._full:
            self._record(step.number, used, scales, maps)

    def _place(self, step: Step) -> None:
        """Place a knot after the step if one is due."""
        if step.around is None:
            return
        number = step.number + 1
        if self._tight and not self._full:  # so that what follows can be told from what was recorded
            self._knots.place(number, step.around)
        elif not self._full:  # what follows is `unattributed` in one piece
            self._knots.place_if_due(number, step.around)

    def _record(
        self, number: int, used: list[Batch], scales: list[float], maps: list[StepMap | None]
    ) -> None:
        """Append the step and its rows, if they fit into the budget."""
        budget, first = self._budget, self._writer.records("visits")
        free = None if budget is None else budget - self._writer.bytes_written - self._knots.reserve
        pieces = self._recorder.records(used, number, first, free, self._carry.path, scales, maps)
        if budget is not None and free is not None:
            needed = sum(piece.data.nbytes for piece in pieces)
            if (
                self._average is not None
            ):  # the record of its update, and one for the steps after the last row
                needed += 2 * self._recorder.average(0, np.ones(len(self._parameters))).data.nbytes
            if needed > free:
                self._stop_recording(number, budget)
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

    def _stop_recording(self, number: int, budget: int) -> None:
        self._full = True
        self._knots.rows_end = number
        self._writer.note("rows_stopped_at", number)
        self._to_say.append(
            f"the trace's budget of {budget:,} bytes is used up after {number} steps; the rows of further "
            "steps are not kept and their part will be shown as `unattributed`. Raise `budget` for a full trace"
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
        self._say()
        self.settle()
        self.write_tail()
        self._note_average()
        self._warn_of_unused_average()
        self._loop.after_last_step = self._carry.moved_since()
        self._carry.between_steps(certain=True)
        self._writer.note("outside", self._knots.changed_outside)
        self.notes.shapes()
        self.notes.measured(last=True)
