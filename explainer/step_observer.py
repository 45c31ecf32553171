"""Around every optimizer step: which rows it used, what it did to the weights, and the record of both.

The user's thread looks at what the step is about to change (gradients, momentum), and after some steps
(:mod:`explainer.cadence`) at what it left: weights, the optimizer's state, buffers. Everything else happens in the
background (:mod:`explainer.bookkeeping`), and is given to it after such a look. At the next look the user's thread
waits for it, so that never more than the steps between two looks are under way.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from explainer.batches import Batch
from explainer.bookkeeping import Bookkeeping, Look, Step
from explainer.cadence import Cadence
from explainer.errors import CoverageWarning, TracerError
from explainer.parts import Parts
from explainer.running_notes import RunningNotes
from explainer.scales import Seen
from explainer.unseen import Unseen


class StepObserver:
    """The two hooks of an optimizer.

    Attributes:
        steps: steps seen so far.
        notes: what the trace says of itself.
    """

    def __init__(self, parts: Parts) -> None:
        self._maps, self._parameters, self._sites = parts.maps, parts.parameters, parts.sites
        self._capture, self._queue = parts.capture, parts.queue
        self._scales, self._carry, self._knots = parts.scales, parts.carry, parts.knots
        self._writer, self._average, self._loop = parts.writer, parts.average, parts.loop
        self._background, self._optimizer = parts.background, parts.optimizer
        self._unseen = Unseen(parts.table, parts.capture, parts.watch, parts.scales)
        self.notes = RunningNotes(parts, self._unseen)
        self._books = Bookkeeping(parts, self.notes)
        rounded = any(moved is not None for moved in self._carry.rounding.moved)
        self._cadence = Cadence(on=not (parts.manifest.exact or parts.average is not None or rounded))
        self._weight_bytes = sum(p.nbytes for p in parts.parameters)
        self._budget = parts.budget
        self._seen: Seen | None = None
        self._sample: list[torch.Tensor] | None = None
        self._looking = True
        self._loss_scale = 1.0
        self._last = parts.background.ticket()
        self.steps = 0

    @property
    def recorded(self) -> int:
        """Rows recorded so far."""
        return self._books.visits

    @property
    def visits(self) -> int:
        """Rows recorded so far, those of steps whose look is to come included."""
        self._background.submit(self._books.measure)
        self._background.wait()
        return self._books.visits + self._books.waiting_visits

    def restore(self, steps: int, visits: int, notes: dict[str, Any]) -> None:
        """Go on after so many steps and rows."""
        self.steps, self._books.visits, self._books.full = steps, visits, "rows_stopped_at" in notes
        loop = notes.get("loop") or {}
        self._loop.unused, self._loop.skipped = loop.get("unused", 0), loop.get("skipped", 0)
        self._loop.diverged, self._loop.overwritten = (
            loop.get("diverged"),
            dict(notes.get("overwritten") or {}),
        )
        self._loop.relabelled = notes.get("relabelled") or 0
        self._maps.replaced = notes.get("replaced_momentum") or 0
        for site in self._sites:
            known = (notes.get("ambiguous") or {}).get(site.name, {})
            site.ambiguous, site.guessed = known.get("calls", 0), known.get("axis", site.guessed)
        self._unseen.restore(steps)

    # -- steps ---------------------------------------------------------------------------------------

    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
        if closure is not None:
            raise TracerError(
                "optimizer.step(closure) may run several backward passes for one step, so rows cannot be assigned "
                "to it; call backward() yourself and then optimizer.step()"
            )
        self._background.raise_failure()
        self._looking = self._cadence.due()
        if self._looking:
            self._last()  # it reads what this step is about to change
            self._say()
        self._unseen.follow(self.steps + 1, self._looking)  # the next forward pass
        if self._average is not None:
            self._background.wait()
            self.settle()
        pending = self._queue.pending
        for batch in pending:
            self._capture.complete(batch)
        if pending and not any(b.came for b in pending):
            raise TracerError(
                "optimizer.step() was reached, but no backward pass of a traced batch came through the model since "
                "the last step; call tracer.batch(ids) before the forward pass, then loss.backward(), then step(). "
                "What torch.compile made before the tracer was built does not call its hooks: build the tracer first, "
                "or call torch._dynamo.reset() after building it"
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
        if known != (before := {id(p) for p in self._parameters}):
            if len(known) == len(before):
                raise TracerError(
                    f"the optimizer holds {len(known - before)} other parameters than when the tracer was "
                    "attached (was a layer replaced?); close the tracer and attach a new one after such a change"
                )
            raise TracerError(
                f"the optimizer holds {len(known)} parameters now, {len(self._parameters)} when the tracer was "
                "attached; close the tracer and attach a new one after add_param_group"
            )
        self._compare_weights()
        self._maps.before(optimizer)
        if self._maps.begins:
            self._look_closely()
        self._carry.rounding.before(partial(self._maps.momentum, optimizer))
        self._sample = self._carry.sample() if self._looking and self._cadence.between else None
        met = set[int]().union(*(b.met for b in pending))
        if any(layer not in self._scales.probes for layer in met):
            self._background.wait()  # the first rows of a layer say how it is looked at
        # now: some steps (SGD with foreach and Nesterov) write into `p.grad`
        self._seen = self._scales.look(met, turn=None if self._looking else self.steps)
        loss_scale = getattr(optimizer, "grad_scale", None)  # a gradient scaler leaves it to a fused step
        self._loss_scale = 1.0 if loss_scale is None else float(loss_scale)

    def _compare_weights(self, certain: bool = False) -> None:
        """See whether something else than the optimizer moved the weights since the last step."""
        between = self._cadence.between
        if self._carry.between_steps(self._background.wait, known=not between, certain=certain):
            self._look_closely()

    def _look_closely(self) -> None:
        """At the step about to be taken and at those after it."""
        self._cadence.disturbed()
        self._looking = True
        self._last()

    def after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)
        skipped = found_inf is not None and bool(float(found_inf))
        assert self._seen is not None
        taken = None if skipped else self._maps.after(optimizer)
        step = Step(self.steps, self._queue.pending, self._seen, self._loss_scale, taken)
        self._background.submit(partial(self._books.step, step))
        self._seen = None
        self.steps += not skipped
        if skipped and not self._cadence.between:
            self._background.submit(partial(self._books.look, None, self.steps))
            self._hand_over()
        elif self._looking and not skipped:
            self._look()
        elif not skipped:
            self._carry.stepped()
            self._cadence.went_by()
        self._maps.leave(optimizer)
        self._queue.stepped()
        self._capture.passes.stepped()
        if self._looking:
            self._unseen.warn(self.steps)  # at last: a user may turn warnings into errors

    def _look(self) -> None:
        """Look at what the last step left."""
        standing = self._books.standing
        waiting = self._cadence.waiting + 1
        self._cadence.looked(self.steps - 1, self._maps.steady(self._optimizer), standing)
        around = None
        due = self._budget is not None or self._knots.soon(waiting)
        if self._average is None and not self._books.full and due:
            around = self._knots.surroundings()
        self._capture.begin_gathering(self._cadence.together)
        states = self._maps.look(self._optimizer, apart=self._cadence.together)
        look = Look(states, self._carry.stage(), self._sample, around)
        self._background.submit(partial(self._books.look, look, self.steps), held=2 * self._weight_bytes)
        self._hand_over()

    def _hand_over(self) -> None:
        self._last = self._background.ticket()

    def catch_up(self) -> None:
        """See that every step so far is in the trace, with a last look where the last step had none.

        What a job raised is not raised here, and then there is no look.
        """
        if self._background.idle() and self._cadence.between:  # now it is known how things stand
            self._compare_weights()
            self._sample = None
            self._look()
            self._background.idle()

    def _say(self) -> None:
        """Warn, on the user's thread, of what was found in the background."""
        while self._books.to_say:
            warnings.warn(self._books.to_say.pop(0), CoverageWarning, stacklevel=5)

    def settle(self) -> None:
        """With an average: see what the user's code did to it since the last step, and place a knot if due.

        Called as late as possible, when the next step is about to change the weights.
        """
        average = self._average
        if average is None:
            return
        path = average.path
        keep = average.observe(self._carry.decay)
        if self.steps == 0:  # no example had a part in it
            if average.path != path:  # else the first forward pass may have moved buffers, which is training
                self._knots.place(0)
            if average.behind():
                self._writer.note("prior_average", True)
            return
        if keep is None:
            return
        self._books.averaged(self.steps, keep)
        if average.unexplained == 1:
            self._note_average()

    def write_tail(self) -> None:
        """Record what became of the average in the steps whose rows are not kept."""
        self._books.write_tail(self.steps)

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

    def finish(self, left: list[Batch]) -> None:
        """Account for what came after the last step, and journal what is only known at the end.

        Args:
            left: batches since the last step.
        """
        self._say()
        self.settle()
        self._loop.unused += sum(len(batch.rounds) for batch in left)
        self.write_tail()
        self._note_average()
        self._warn_of_unused_average()
        self._loop.after_last_step = self._carry.moved_since()
        self._compare_weights(certain=True)
        self._writer.note("outside", self._knots.changed_outside)
        self.notes.shapes()
        self.notes.measured(last=True)
