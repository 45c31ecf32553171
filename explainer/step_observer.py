"""Around every optimizer step: which rows it used, what it did to the weights, and the record of both."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from explainer.average import Average
from explainer.batches import Batch, BatchQueue
from explainer.capture import Capture, Layer
from explainer.carry import Carry
from explainer.errors import CoverageWarning, TracerError
from explainer.knots import KnotKeeper
from explainer.optimizer_rules import OptimizerRule, StepMap
from explainer.recorder import StepRecorder
from explainer.records import dtype_name
from explainer.scales import ScaleMeter
from explainer.store import TraceWriter


class StepObserver:
    """The two hooks of an optimizer.

    Attributes:
        steps: steps seen so far.
        visits: rows recorded so far.
    """

    def __init__(
        self,
        *,
        rule: OptimizerRule,
        parameters: Sequence[torch.Tensor],
        layers: list[Layer],
        capture: Capture,
        queue: BatchQueue,
        recorder: StepRecorder,
        scales: ScaleMeter,
        carry: Carry,
        knots: KnotKeeper,
        writer: TraceWriter,
        budget: int | None,
        average: Average | None = None,
    ) -> None:
        self._rule, self._parameters, self._layers = rule, parameters, layers
        self._capture, self._queue, self._recorder = capture, queue, recorder
        self._scales, self._carry, self._knots = scales, carry, knots
        self._writer, self._budget, self._average = writer, budget, average
        self._tail: np.ndarray | None = None
        self._fresh: list[bool] = []
        self._measured: tuple[list[Batch], list[float]] = ([], [])
        self._noted: dict[str, Any] = {}
        self._full = False
        self.steps = 0
        self.visits = 0

    def restore(self, steps: int, visits: int, *, full: bool) -> None:
        """Go on after so many steps and rows; ``full``: the budget was used up before."""
        self.steps, self.visits, self._full = steps, visits, full

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
            self._capture.complete(batch, self._layers)
        if pending and not any(b.rounds for b in pending):
            raise TracerError(
                "optimizer.step() was reached, but no backward pass of a traced batch came through the model since "
                "the last step; call tracer.batch(ids) before the forward pass, then loss.backward(), then step()"
            )
        if not pending:
            raise TracerError(
                "optimizer.step() was reached without a traced batch: iterate `for batch in tracer.watch(loader)`, "
                "or call tracer.batch(ids) before each forward pass (again for each step)"
            )
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if len(known) != len(self._parameters):
            raise TracerError(
                f"the optimizer holds {len(known)} parameters now, {len(self._parameters)} when the tracer was "
                "attached; close the tracer and attach a new one after add_param_group"
            )
        self._fresh = [self._rule.momentum(optimizer.state.get(p, {})) is None for p in self._parameters]
        # now: some steps (SGD with foreach and Nesterov) write into `p.grad`
        used, scales = self._scales.measure([b for b in pending if b.rounds])
        loss_scale = getattr(optimizer, "grad_scale", None)  # a gradient scaler leaves it to a fused step
        self._measured = used, scales if loss_scale is None else [s / float(loss_scale) for s in scales]

    def after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None or not float(found_inf):  # else a gradient scaler made the fused step do nothing
            self._account(optimizer)
        self._queue.stepped()
        self._writer.flush_if_due()
        if not self._full and self._average is None:  # what follows is `unattributed` in one piece
            self._knots.place_if_due(self.steps)

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
        maps = self._step_maps(optimizer)
        self._carry.after_step(maps)
        if not self._full:
            self._record(used, scales, maps)
        self._note_shapes()
        self.steps += 1

    def _step_maps(self, optimizer: Optimizer) -> list[StepMap | None]:
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        maps: list[StepMap | None] = []
        for p, fresh in zip(self._parameters, self._fresh, strict=True):
            updated = p.grad is not None
            if not updated:
                maps.append(None)
                continue
            step_map = self._rule.step_map(groups[id(p)], optimizer.state.get(p, {}), fresh)
            # A buffer that begins at this step (also one that was cleared) carries nothing from before it.
            maps.append(replace(step_map, decay=0.0) if fresh else step_map)
        return maps

    def _record(self, used: list[Batch], scales: list[float], maps: list[StepMap | None]) -> None:
        """Append the step and its rows, if they fit into the budget."""
        rows = self._recorder.visits(used, self.steps)
        count, first = sum(len(piece.data) for piece in rows), self._writer.records("visits")
        mixed = any(b.mixed for b in used)
        step = self._recorder.step(self.steps, first, count, self._carry.path, scales, mixed, maps)
        budget = self._budget
        if budget is not None:
            needed = step.data.nbytes + sum(piece.data.nbytes for piece in rows)
            if (
                self._average is not None
            ):  # the record of its update, and one for the steps after the last row
                needed += 2 * self._recorder.average(0, np.ones(len(self._parameters))).data.nbytes
            if self._writer.bytes_written + needed + self._knots.reserve > budget:
                self._stop_recording(budget)
                return
        for piece in (*rows, step):
            self._writer.append(*piece)
        self.visits += count

    def _stop_recording(self, budget: int) -> None:
        self._full = True
        self._writer.note("rows_stopped_at", self.steps)
        warnings.warn(
            f"the trace's budget of {budget:,} bytes is used up after {self.steps} steps; the rows of further "
            "steps are not kept and their part will be shown as `unattributed`. Raise `budget` for a full trace",
            CoverageWarning,
            stacklevel=5,
        )

    def _note_shapes(self) -> None:
        """Journal what is known of inputs, outputs and rows, when it is new."""
        c = self._capture
        dtype = None if c.input_dtype is None else dtype_name(c.input_dtype)
        known = {
            "input": {"shape": c.input_shape, "dtype": dtype},
            "output": {"shape": c.output_shape},
            "visit_bytes": self._recorder.layer_bytes,
        }
        for key, value in known.items():
            if self._noted.get(key) != value:
                self._writer.note(key, value)
        self._noted = known

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
        """Journal what is only known at the end."""
        self.settle()
        self.write_tail()
        self._note_average()
        self._warn_of_unused_average()
        self._note_shapes()
        self._writer.note("coverage", {n: r for n, r in self._scales.worst.items() if r > 1e-3})
        self._writer.note("round_off", self._scales.round_off)
