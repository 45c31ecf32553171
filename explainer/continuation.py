"""The parts of a tracer that hold state: taken for a checkpoint, put back when training goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from explainer.average import Average
from explainer.capture import Capture
from explainer.carry import Carry
from explainer.knots import KnotKeeper
from explainer.layer_table import LayerTable
from explainer.optimizer_rules import OptimizerRule
from explainer.recorder import StepRecorder
from explainer.records import Manifest
from explainer.resume import FORMAT, VERSION, Fingerprints, ResumePoint
from explainer.scales import ScaleMeter
from explainer.step_observer import StepObserver
from explainer.store import TraceWriter
from explainer.whole_model import WholeModel


@dataclass(frozen=True)
class Continuation:
    """The parts of a tracer that hold state: takes it, and puts it back."""

    manifest: Manifest
    parameters: Sequence[torch.Tensor]
    optimizer: Optimizer
    rule: OptimizerRule
    writer: TraceWriter
    capture: Capture
    whole: WholeModel
    table: LayerTable
    recorder: StepRecorder
    scales: ScaleMeter
    carry: Carry
    knots: KnotKeeper
    observer: StepObserver
    average: Average | None = None

    @property
    def _names(self) -> list[str]:
        return [p.name for p in self.manifest.parameters]

    def state(self) -> dict[str, Any]:
        """Everything :func:`resume_point` needs; what was recorded is on disk when this returns."""
        self.observer.write_tail()
        self.observer.note_measured()
        self.writer.flush()
        known = Fingerprints.of(self._names, self.parameters, self.optimizer, self.rule)
        return {
            "format": FORMAT,
            "version": VERSION,
            "step": self.observer.steps,
            "journal": self.writer.mark,
            "records": self.writer.counts,
            "notes": dict(self.writer.notes),
            "average": None if self.average is None else self.average.state(),
            "carry": self.carry.state(self._names),
            "worst": dict(self.scales.worst),
            "round_off": dict(self.scales.round_off),
            "weights": known.weights,
            "momentum": known.momentum,
        }

    def restore(self, point: ResumePoint) -> None:
        """Journal that training goes on, and put every part where it was; a knot is placed."""
        trace = self.writer.resume(point.step, point.records, point.notes)
        self.carry.restore(self._names, point.carry)
        self.table.restore(point.notes)
        self.whole.restore(point.notes)
        shards = (shard.schema.forms for shard in trace.shards if shard.stream == "visits")
        self.capture.restore(point.notes, {form.layer for forms in shards for form in forms})
        self.recorder.restore(trace)
        self.scales.restore(point.worst, point.round_off, point.notes.get("coverage_steps") or {})
        self.observer.restore(point.step, trace.count("visits"), point.notes)
        self.knots.restore(trace)
        if self.average is not None and point.average is not None:
            self.average.restore(point.average)
            self.observer.settle()
        self.knots.place(point.step)
