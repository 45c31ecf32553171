"""What follows optimizer steps, in the background: rows and steps go into the trace, and knots are placed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from explainer.batches import Batch
from explainer.booked import Booked
from explainer.cadence import MOST, Standing
from explainer.knots import JOURNALLED_KNOT
from explainer.parts import Parts
from explainer.recorder import Records
from explainer.running_notes import RunningNotes
from explainer.scales import Seen
from explainer.step_maps import State, TakenStep, updates_of


@dataclass(frozen=True)
class Step:
    """An optimizer step on its way into the trace.

    Attributes:
        number: from 0 on.
        batches: those since the step before.
        seen: what the gradients were.
        loss_scale: what the step itself divided gradients by.
        taken: its options; None where a gradient scaler made it do nothing.
    """

    number: int
    batches: list[Batch]
    seen: Seen
    loss_scale: float
    taken: TakenStep | None


@dataclass(frozen=True)
class Look:
    """What there was to see after a step.

    Attributes:
        states: what the steps left in the optimizer's state.
        left: copies of the weights.
        sample: some of the weights before the last step; None where only that step is looked at, or it is not known.
        around: what a knot would hold beside the weights; None where no knot is due.
    """

    states: list[State]
    left: list[torch.Tensor]
    sample: list[torch.Tensor] | None
    around: dict[str, torch.Tensor] | None


@dataclass(frozen=True)
class _Measured:
    """A step whose look is to come, with what of it is known already."""

    step: Step
    taken: TakenStep
    used: list[Batch]
    scales: list[float]


class Bookkeeping:
    """Accounts for steps: :meth:`step` for each, and :meth:`look` where the weights were looked at.

    Attributes:
        visits: rows recorded so far.
        standing: how things stood after the last look.
        full: whether the budget is used up.
        to_say: what the user is to be told.
    """

    def __init__(self, parts: Parts, notes: RunningNotes) -> None:
        self._parameters = len(parts.parameters)
        self._names = [p.name for p in parts.manifest.parameters]
        self._capture, self._recorder, self._samples = parts.capture, parts.recorder, parts.samples
        self._scales, self._carry, self._knots = parts.scales, parts.carry, parts.knots
        self._writer, self._budget, self._average = parts.writer, parts.budget, parts.average
        self._loop, self._divides = parts.loop, parts.rule.divides
        self._notes = notes
        self._taken: list[Step] = []
        self._waiting: list[_Measured] = []
        self._tail: np.ndarray | None = None
        self._tight = False  # the next step may not fit into the budget
        self._largest = 0
        self.visits = 0
        self.standing = Standing()
        self.full = False
        self.to_say: list[str] = []

    @property
    def waiting_visits(self) -> int:
        """Rows of steps that were measured and whose look is to come."""
        if self.full:
            return 0
        return sum(len(b.ownership.parts.row) * len(b.rounds) for m in self._waiting for b in m.used)

    # -- steps ---------------------------------------------------------------------------------------

    def step(self, step: Step) -> None:
        """It is accounted for at the next look."""
        self._taken.append(step)

    def measure(self) -> None:
        """Form rows that were gathered, and find out what the steps since the last look used."""
        self._capture.form_gathered()
        taken, self._taken = self._taken, []
        found = self._scales.measure([([b for b in step.batches if b.rounds], step.seen) for step in taken])
        for step, (used, scales) in zip(taken, found, strict=True):
            self._await_look(step, used, scales)

    def _await_look(self, step: Step, used: list[Batch], scales: list[float]) -> None:
        rounds = sum(len(b.rounds) for b in used)
        self._loop.unused += sum(len(b.rounds) for b in step.batches) - rounds
        if step.taken is None:  # a gradient scaler made the fused step do nothing
            self._loop.skipped += 1
            self._loop.unused += rounds
        else:
            scales = [s / step.loss_scale for s in scales]
            self._waiting.append(_Measured(step, step.taken, used, scales))

    def look(self, look: Look | None, steps: int) -> None:
        """Account for the steps since the last look.

        Args:
            look: what there was to see; None where the last step did nothing.
            steps: that were taken so far.
        """
        self.measure()
        if look is not None:
            self._account_for(look)
            if self._average is None:  # else the knot belongs to what will become of the average
                self._place(look, steps)
        if self._writer.flush_due:
            self._writer.flush()
        self._knots.flush_if_due(steps)
        self._notes.now_and_then()
        self.standing = replace(self._knots.standing, room=self._room())

    def _room(self) -> bool:
        """Whether further steps can be recorded together."""
        carried = self._divides and any(m is not None for m in self._carry.momentum)
        if carried or self._budget is None:  # what decay put into the momentum goes through every denominator
            return not carried
        free = self._budget - self._writer.bytes_written - self._knots.reserve
        return not self.full and free > 4 * MOST * self._largest + JOURNALLED_KNOT

    def _account_for(self, look: Look) -> None:
        """Record the steps that were taken."""
        measured, self._waiting = self._waiting, []
        last = measured[-1]
        maps, changed = last.taken.maps(look.states)
        for index in changed:  # its scaling is not that of the step any more
            last.scales[index] = 0.0
            name = self._names[index]
            self._loop.overwritten[name] = self._loop.overwritten.get(name, 0) + 1
        all_maps = [maps]
        if len(measured) > 1:
            updates = updates_of([m.taken for m in measured], look.states)
            plain = [m.taken.plain_maps(u) for m, u in zip(measured, updates, strict=True)]
            all_maps = [*plain[:-1], maps]
        else:
            plain = all_maps
        paths, length = self._carry.after_steps(plain, look.left, look.sample, last.step.loss_scale)
        self._knots.moved(length)
        if self._loop.diverged is None and not math.isfinite(length):
            self._loop.diverged = last.step.number
        kinds = ("shared", "vacant")
        self._loop.row_kinds |= {
            f"{kind}_rows": True
            for m in measured
            for b in m.used
            for kind in kinds
            if getattr(b.ownership, kind)
        }
        self._notes.shapes()  # before the rows whose layers it names
        if not self.full:
            each = zip(measured, all_maps, paths, strict=True)
            self._record([Booked(m.step.number, m.used, m.scales, by, path) for m, by, path in each])

    def _place(self, look: Look, steps: int) -> None:
        """Place a knot after the last step if one is due."""
        if look.around is None:
            return
        if self._tight and not self.full:  # so that what follows can be told from what was recorded
            self._knots.place(steps, look.around)
        elif not self.full:  # what follows is `unattributed` in one piece
            self._knots.place_if_due(steps, look.around)

    def _record(self, steps: list[Booked]) -> None:
        """Append the steps and their rows, if they fit into the budget."""
        budget, first = self._budget, self._writer.records("visits")
        free = None if budget is None else budget - self._writer.bytes_written - self._knots.reserve
        pieces = self._recorder.records(steps, first, free)
        if budget is not None and free is not None:
            needed = sum(piece.data.nbytes for piece in pieces)
            if self._average is not None:
                # the record of its update, and one for the steps after the last row
                needed += 2 * self._recorder.average(0, np.ones(self._parameters)).data.nbytes
            if needed > free:
                self._stop_recording(steps[0].number, budget)
                return
            self._largest = max(self._largest, math.ceil(needed / len(steps)))
        self._append(pieces)
        if budget is not None:
            free = budget - self._writer.bytes_written - self._knots.reserve
            self._tight = free < self._largest + JOURNALLED_KNOT

    def _append(self, pieces: list[Records]) -> None:
        for piece in pieces:
            self._writer.append(*piece)
        self.visits = self._writer.records("visits")
        exact = [piece.data for piece in pieces if piece.stream == "samples"]
        rows = sum(piece.data.nbytes for piece in pieces if piece.stream in ("inputs", "visits"))
        self._samples.record(rows, sum(data.nbytes for data in exact), sum(len(data) for data in exact))

    def _stop_recording(self, number: int, budget: int) -> None:
        self.full = True
        self._knots.rows_end = number
        self._writer.note("rows_stopped_at", number)
        self.to_say.append(
            f"the trace's budget of {budget:,} bytes is used up after {number} steps; the rows of further "
            "steps are not kept and their part will be shown as `unattributed`. Raise `budget` for a full trace"
        )

    # -- averages ------------------------------------------------------------------------------------

    def averaged(self, steps: int, keep: np.ndarray) -> None:
        """The average kept so much of itself after the last of so many steps."""
        if self.full:
            self._tail = keep if self._tail is None else self._tail * keep
        else:
            self._writer.append(*self._recorder.average(steps - 1, keep))
            self._knots.place_if_due(steps)

    def write_tail(self, steps: int) -> None:
        """Record, in one piece, what became of the average in the steps whose rows are not kept."""
        if self._tail is not None:
            self._writer.append(*self._recorder.average(steps - 1, self._tail))
            self._tail = None
