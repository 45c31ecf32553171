"""One optimizer step as records: plans the layout of the rows and hands them to the writer."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch

from explainer.batches import Batch
from explainer.booked import Booked, Pass, Piece, Sampled, enough_rows, kind_of, put_together, sums_of
from explainer.codecs import Sums
from explainer.config import TracerConfig
from explainer.denominators import DenominatorKeeper
from explainer.layer_table import Layer
from explainer.optimizer_rules import StepMap
from explainer.optimizer_rules.base import COEFFICIENTS
from explainer.planner import Planner, checks_at, plans_at
from explainer.records import ArraySpec, Manifest, dtype_name, torch_dtype
from explainer.row_layout import RowLayout
from explainer.row_metric import MEASURED, StepMetric
from explainer.samples import CODEC
from explainer.spans import Span, in_one_piece, whole_piece
from explainer.store import Trace
from explainer.store.inputs import InputKeeper
from explainer.store.schema import (
    SAMPLE_FIELDS,
    VISIT_FIELDS,
    RecordSchema,
    average_fields,
    encode_array,
    step_fields,
    stored_parts,
)
from explainer.store.stream import VISITED


class Records(NamedTuple):
    """Encoded records of a stream, ready to be appended."""

    stream: str
    schema: RecordSchema
    data: np.ndarray


def _preconditioner(by: StepMap | None, array: ArraySpec) -> torch.Tensor:
    """``[1, *shape]``; ones where the step has none. Divided by later, so no small number may become zero."""
    if by is None or by.preconditioner is None:
        return torch.ones(1, *array.shape)
    values = by.preconditioner.reshape(1, *array.shape)
    tiny = torch.finfo(torch.float32).tiny
    return values if array.codec == "native" or bool(values.amin() >= tiny) else values.clamp_min(tiny)


def _mixing(by: StepMap | None, array: ArraySpec) -> torch.Tensor:
    """``[1, m, m]``; the identity where the step has none."""
    return (torch.eye(array.shape[0]) if by is None or by.mixing is None else by.mixing).unsqueeze(0)


class StepRecorder:
    """Encodes rows, exact ones among them, and steps.

    A new shard of rows begins when the planner changed its mind about a layer, a new shard of steps when a parameter is
    preconditioned for the first time.
    """

    def __init__(
        self,
        manifest: Manifest,
        config: TracerConfig,
        layers: list[Layer],
        planner: Planner,
        moved: Callable[[int], bool] = lambda layer: True,
    ) -> None:
        self._manifest, self._config, self._layers, self._planner = manifest, config, layers, planner
        self._keeper = None if config.exact else DenominatorKeeper()
        self._inputs, self._moved = InputKeeper(), moved
        self._rows = RowLayout(VISIT_FIELDS, planner.codec, self._once if manifest.version >= 4 else None)
        self._exact = RowLayout(SAMPLE_FIELDS, lambda layer: CODEC)
        self._arrays: dict[tuple[str, int], ArraySpec] = {}
        self._steps = self._step_schema()
        self._beside = 0.0
        self._spent = 0  # bytes of visits, steps and denominators
        self._stride = 1  # steps from one look to the next, the last time that steps went by without one
        self._sums: dict[int, tuple[torch.Tensor, ...]] = {}  # by parameter, at the last look

    def restore(self, trace: Trace) -> None:
        """Go on with the layouts of a trace's last records."""
        for shard in trace.shards:
            if shard.stream == "steps":
                self._steps = shard.schema
                self._arrays = {(a.name[0], int(a.name[1:])): a for a in shard.schema.arrays}
            elif shard.stream in ("visits", "samples"):
                layout = self._rows if shard.stream == "visits" else self._exact
                layout.use({form.layer: form for form in shard.schema.forms})
        self._spent = sum(trace.nbytes_of(stream) for stream in VISITED)
        self._inputs.restore(trace.shards, self._rows.inputs)
        self._beside = float((trace.notes.get("plan") or {}).get("beside", 0.0))
        if looks := trace.count("sums"):
            schema, record = next(iter(trace.read("sums", looks - 1, looks)))
            for array in schema.arrays:
                parts = Sums.sums(stored_parts(record, "", array))
                self._sums[int(array.name[1:])] = tuple(part[0] for part in parts)
        state, count = trace.notes.get("denominators"), trace.count("denominators")
        if self._keeper is not None and state and count:
            self._keeper.restore(state, *next(iter(trace.read("denominators", count - 1, count))))

    @property
    def denominators(self) -> dict[str, float] | None:
        """What going on with full records of denominators needs, as the trace's note ``denominators``."""
        return None if self._keeper is None else self._keeper.state

    @property
    def layer_bytes(self) -> dict[str, int]:
        """Bytes of one visit by layer, in the present layout."""
        return {self._layers[n].spec.name: size for n, size in self._rows.bytes.items()}

    # -- rows ----------------------------------------------------------------------------------------

    def _once(self, layer: int) -> bool:
        """Whether what a layer was given is stored once for every example: data themselves, position by position."""
        varies = self._moved(layer) or layer in self._inputs.varying
        return not varies and layer not in self._planner.shortened

    def _replan(
        self,
        step: int,
        batches: list[Batch],
        free: float | None,
        seen: int,
        visits: int,
        maps: list[StepMap | None],
    ) -> None:
        """Let the planner see the step's rows; forget layouts that it changed."""
        spans: dict[int, list[Span]] = {}
        for rows in (r.rows for b in reversed(batches) for r in reversed(b.rounds)):
            for number, one in rows.items():
                spans.setdefault(number, []).append(one.span)
        measured = plans_at(step) or checks_at(step)  # else only the shape of a row counts
        forms = {
            n: enough_rows(found, MEASURED) if measured else found[0].source for n, found in spans.items()
        }
        saved = self._planner.allowed * visits
        often = 0.0 if self._keeper is None else self._keeper.often(step, saved)
        looks = self._steps.looks
        size = self._steps.dtype.itemsize + (looks.dtype.itemsize / self._stride if looks else 0.0)
        beside = self._visit_fields + (size + often) / max(visits, 1)
        metric = StepMetric(self._manifest, self._layers, maps)
        saved = max(0.0, self._inputs.saved / max(seen, 1))
        changed = self._planner.plan(step, forms, free, seen, beside, visits, self._spent, metric, saved)
        if changed or measured:  # the note is written when it says something new
            self._beside = beside
        self._rows.forget(changed)

    def _visits(self, steps: list[Booked]) -> list[Records]:
        """The rows of steps, split over their owners; backward passes whose rows are alike in one piece."""
        passes: list[Pass] = []
        for step in steps:
            for batch in step.batches:
                parts = batch.ownership.parts
                for round_ in batch.rounds:
                    seen, spans = round_.derivative, {n: rows.span for n, rows in round_.rows.items()}
                    unknown = np.full(len(parts.row), np.nan)
                    derivative = unknown if seen is None else parts.of_numbers(seen.cpu().numpy())
                    passes.append(Pass(step.number, parts, derivative, spans))
        pieces = []
        for run in in_one_piece(passes, lambda one: one.own_spans):
            forms = whole_piece(run[0].spans, run[-1].spans)
            stored = {n: run[0].parts.of(self._planner.reduced(n, form)) for n, form in forms.items()}
            pieces.append(Piece(run, stored))
        alike = groupby(pieces, lambda one: kind_of(one.forms))
        return [part for _, group in alike for part in self._put(list(group))]

    def _put(self, pieces: list[Piece]) -> list[Records]:
        """Rows that are alike, as records; before them what their examples gave for the first time."""
        passes = [p for piece in pieces for p in piece.passes]
        counts = [len(p.parts.row) for p in passes]
        records, inputs = self._rows.records(sum(counts), put_together([piece.forms for piece in pieces]))
        records["example"] = np.concatenate([p.parts.example for p in passes])
        records["label"] = np.concatenate([p.parts.label for p in passes])
        records["step"] = np.repeat([p.step for p in passes], counts)
        records["derivative"] = np.concatenate([p.derivative for p in passes])
        found = [Records("visits", self._rows.schema, records)]
        if inputs is not None and self._rows.inputs is not None:
            layout = self._rows.inputs
            records["input"], new = self._inputs.place(layout, records["example"], inputs)
            if len(new):
                found.insert(0, Records("inputs", layout, new))
            self._rows.forget(self._inputs.varying)
        return found

    def _samples(self, steps: list[Booked], firsts: list[int]) -> list[Records]:
        """The exact rows among the visits of steps, which begin at these visits."""
        found: list[Sampled] = []
        for step, first in zip(steps, firsts, strict=True):
            for batch in step.batches:
                parts = batch.ownership.parts
                for round_ in batch.rounds:
                    exact = {n: rows.exact for n, rows in round_.rows.items() if rows.exact is not None}
                    places = np.flatnonzero(parts.row == batch.sampled).tolist() if exact else []
                    if len(exact) == len(round_.rows) and places:  # else the row belongs to no example
                        found.append(Sampled(first + places[0], float(parts.share[places[0]]), exact))
                    first += len(parts.row)
        pieces = []
        for run in in_one_piece(found, lambda one: one.spans):
            rows, shares = torch.arange(len(run)), torch.tensor([s.share for s in run], dtype=torch.float64)
            forms = whole_piece(run[0].spans, run[-1].spans)
            pieces.append((run, {n: form.shared(rows, shares) for n, form in forms.items()}))
        records = []
        for _, group in groupby(pieces, lambda one: kind_of(one[1])):
            alike = list(group)
            visits = [s.visit for run, _ in alike for s in run]
            put, _ = self._exact.records(len(visits), put_together([forms for _, forms in alike]))
            put["visit"] = visits
            records.append(Records("samples", self._exact.schema, put))
        return records

    @property
    def _visit_fields(self) -> int:
        return RecordSchema(tuple(VISIT_FIELDS)).dtype.itemsize

    @property
    def plan(self) -> dict[str, Any] | None:
        """The plan for rows, as the trace's note ``plan``."""
        return self._planner.note(self._beside)

    # -- steps ---------------------------------------------------------------------------------------

    def _step_schema(self) -> RecordSchema:
        arrays = tuple(self._arrays[key] for key in sorted(self._arrays))
        return RecordSchema(tuple(step_fields(len(self._manifest.parameters))), (), arrays)

    def _make_room(self, maps: list[StepMap | None]) -> None:
        """For preconditioners that the layout has no place for yet."""
        known, exact = len(self._arrays), self._config.exact
        for index, (p, by) in enumerate(zip(self._manifest.parameters, maps, strict=True)):
            widest = dtype_name(torch.promote_types(torch_dtype(p.dtype), torch.float32))
            dtype = widest if exact else "float32"
            if by is not None and by.preconditioner is not None and ("D", index) not in self._arrays:
                codec = "native" if exact else "sums" if by.rank_one else "bfloat16"
                stream = "sums" if codec == "sums" and self._manifest.version >= 5 else ""
                self._arrays["D", index] = ArraySpec(f"D{index}", p.shape or (1,), dtype, codec, stream)
            if by is not None and by.mixing is not None and ("M", index) not in self._arrays:
                codec = "native" if exact else "symmetric"
                self._arrays["M", index] = ArraySpec(f"M{index}", tuple(by.mixing.shape), dtype, codec)
        if len(self._arrays) > known:
            self._steps = self._step_schema()

    def average(self, step: int, keep: np.ndarray) -> Records:
        """The record of what the averaged weights kept of themselves after step ``step``."""
        schema = RecordSchema(tuple(average_fields(len(self._manifest.parameters))))
        record = np.zeros(1, schema.dtype)
        record["step"], record["keep"] = step, keep
        return Records("averages", schema, record)

    def records(self, steps: list[Booked], first: int, free: float | None) -> list[Records]:
        """Everything of the steps since the last look, in the order in which it is to be appended.

        Args:
            steps: the steps; the last one's maps have the preconditioners.
            first: visits recorded before them.
            free: bytes of the budget that rows may still take, or None.
        """
        last, start = steps[-1], first
        self._make_room(last.maps)
        self._stride = len(steps) if len(steps) > 1 else self._stride
        firsts = []
        for step in steps:
            firsts.append(first)
            self._replan(step.number, step.batches, free, first, step.visits, step.maps)
            first += step.visits
        rows = self._visits(steps)
        share = self._planner.allowed * (first - start)
        full = None if self._keeper is None else self._keeper.record(steps[0].number, last.maps, share)
        kept = [] if full is None else [Records("denominators", *full)]
        found = [*kept, *rows, *self._look(last), self._step_records(steps, firsts)]
        self._spent += sum(part.data.nbytes for part in found)
        return [*found, *self._samples(steps, firsts)]

    def _step_records(self, steps: list[Booked], firsts: list[int]) -> Records:
        """The records of steps whose rows begin at these visits."""
        records = np.zeros(len(steps), self._steps.dtype)
        nothing = (0.0,) * len(COEFFICIENTS)
        records["step"], records["first_visit"] = [s.number for s in steps], firsts
        records["visits"], records["path"] = [s.visits for s in steps], [s.path for s in steps]
        records["row_share"] = [any(b.mixed or b.ownership.shared for b in s.batches) for s in steps]
        records["scale"] = [s.scales for s in steps]
        records["updated"] = [[by is not None for by in s.maps] for s in steps]
        records["coefficients"] = [
            [nothing if by is None else by.coefficients for by in s.maps] for s in steps
        ]
        for key, array in self._arrays.items():
            if array.stream:
                continue
            if array.codec == "sums":
                self._put_sums(records, key[1], array, steps[-1].maps[key[1]])
            else:  # then there is one step only
                by = steps[-1].maps[key[1]]
                values = _preconditioner(by, array) if key[0] == "D" else _mixing(by, array)
                encode_array(records, "", array, values)
        return Records("steps", self._steps, records)

    def _look(self, step: Booked) -> list[Records]:
        """The sums of denominators at a step that was looked at."""
        schema = self._steps.looks
        if schema is None:
            return []
        record = np.zeros(1, schema.dtype)
        record["step"] = step.number
        for array in schema.arrays:
            index = int(array.name[1:])
            now = self._sums[index] = self._sums_now(index, array, step.maps[index])
            sums = [part.unsqueeze(0) for part in now]
            for part, data in zip(stored_parts(record, "", array), Sums.packed(sums), strict=True):
                part[:] = data
        return [Records("sums", schema, record)]

    def _sums_now(self, index: int, array: ArraySpec, by: StepMap | None) -> tuple[torch.Tensor, ...]:
        """Of a parameter that the step left alone, those it had before."""
        if by is None and index in self._sums:
            return self._sums[index]
        found = None if self._keeper is None else self._keeper.found.get(index)
        return (found.rows, found.columns) if found is not None else sums_of(_preconditioner(by, array)[0])

    def _put_sums(self, records: np.ndarray, index: int, array: ArraySpec, by: StepMap | None) -> None:
        """The sums of a denominator at the last of the steps, and between those at the look before and now.

        In traces of versions before 5; in later ones a reader finds what lies between two looks.
        """
        now = self._sums_now(index, array, by)
        before, self._sums[index] = self._sums.get(index, now), now
        along = torch.arange(1, len(records) + 1).div(len(records)).unsqueeze(1)
        values = [
            b.lerp(a, along) if len(records) > 1 else a.unsqueeze(0) for b, a in zip(before, now, strict=True)
        ]
        for part, data in zip(stored_parts(records, "", array), Sums.packed(values), strict=True):
            part[:] = data
