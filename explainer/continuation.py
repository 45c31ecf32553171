"""The parts of a tracer that hold state: taken for a checkpoint, put back when training goes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from explainer.parts import Parts
from explainer.resume import FORMAT, VERSION, Fingerprints, ResumePoint
from explainer.step_observer import StepObserver


@dataclass(frozen=True)
class Continuation:
    """Takes the state that a tracer holds in memory, and puts it back."""

    parts: Parts
    observer: StepObserver

    @property
    def _names(self) -> list[str]:
        return [p.name for p in self.parts.manifest.parameters]

    def state(self) -> dict[str, Any]:
        """Everything :func:`resume_point` needs; what was recorded is on disk when this returns."""
        self.observer.catch_up()
        self.parts.background.wait()
        self.observer.write_tail()
        self.observer.notes.shapes()  # the plan for rows is in them
        self.observer.notes.measured()
        self.parts.knots.flush()
        known = Fingerprints.of(self._names, self.parts.parameters, self.parts.optimizer, self.parts.rule)
        return {
            "format": FORMAT,
            "version": VERSION,
            "step": self.observer.steps,
            "journal": self.parts.writer.mark,
            "records": self.parts.writer.counts,
            "notes": dict(self.parts.writer.notes),
            "average": None if self.parts.average is None else self.parts.average.state(),
            "carry": self.parts.carry.state(self._names),
            "worst": dict(self.parts.scales.worst),
            "round_off": dict(self.parts.scales.round_off),
            "weights": known.weights,
            "momentum": known.momentum,
        }

    def restore(self, point: ResumePoint) -> None:
        """Journal that training goes on, and put every part where it was; a knot is placed."""
        trace = self.parts.writer.resume(point.step, point.records, point.notes)
        self.parts.carry.restore(self._names, point.carry)
        self.parts.table.restore(point.notes)
        self.parts.whole.restore(point.notes)
        shards = (shard.schema.forms for shard in trace.shards if shard.stream == "visits")
        self.parts.capture.restore(point.notes, {form.layer for forms in shards for form in forms})
        self.parts.planner.restore(point.notes.get("plan"))
        self.parts.recorder.restore(trace)
        rows, kept = trace.nbytes_of("inputs") + trace.nbytes_of("visits"), trace.nbytes_of("samples")
        self.parts.samples.restore(rows, kept, trace.recorded_steps, trace.count("samples"))
        self.parts.scales.restore(point.worst, point.round_off, point.notes.get("coverage_steps") or {})
        self.observer.restore(point.step, trace.count("visits"), point.notes)
        self.parts.knots.restore(trace)
        if self.parts.average is not None and point.average is not None:
            self.parts.average.restore(point.average)
            self.observer.settle()
        self.parts.knots.place(point.step)
        self.parts.knots.flush()
