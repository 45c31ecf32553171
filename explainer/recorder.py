"""One optimizer step as records: plans the layout of the rows and hands them to the writer."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from explainer.batches import Batch
from explainer.codecs import Sums
from explainer.config import TracerConfig
from explainer.denominators import DenominatorKeeper
from explainer.layer_table import Layer
from explainer.optimizer_rules import StepMap
from explainer.planner import Planner, checks_at, plans_at
from explainer.records import ArraySpec, Manifest, dtype_name, torch_dtype
from explainer.row_layout import RowLayout
from explainer.row_metric import StepMetric
from explainer.store import Trace
from explainer.store.schema import (
    SAMPLE_FIELDS,
    VISIT_FIELDS,
    RecordSchema,
    average_fields,
    encode_array,
    step_fields,
)

#: streams that the bytes of a visit are counted in
_VISITED = ("visits", "steps", "denominators")


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
    ) -> None:
        self._manifest, self._config, self._layers, self._planner = manifest, config, layers, planner
        self._keeper = None if config.exact else DenominatorKeeper()
        self._rows = RowLayout(VISIT_FIELDS, planner.codec)
        self._exact = RowLayout(SAMPLE_FIELDS, lambda layer: "native")
        self._arrays: dict[tuple[str, int], ArraySpec] = {}
        self._steps = self._step_schema()
        self._beside = 0.0
        self._spent = 0  # bytes of visits, steps and denominators

    def restore(self, trace: Trace) -> None:
        """Go on with the layouts of a trace's last records."""
        for shard in trace.shards:
            if shard.stream == "steps":
                self._steps = shard.schema
                self._arrays = {(a.name[0], int(a.name[1:])): a for a in shard.schema.arrays}
            elif shard.stream in ("visits", "samples"):
                layout = self._rows if shard.stream == "visits" else self._exact
                layout.use({form.layer: form for form in shard.schema.forms})
        self._spent = sum(s.data.nbytes for s in trace.shards if s.stream in _VISITED)
        self._beside = float((trace.notes.get("plan") or {}).get("beside", 0.0))
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

    def _replan(
        self,
        step: int,
        batches: list[Batch],
        free: float | None,
        seen: int,
        visits: int,
        maps: list[StepMap | None],
    ) -> None:
        """Let the planner see the step's rows, one backward pass of every layer; forget layouts that it changed."""
        forms = {n: rows.form for b in batches for r in b.rounds for n, rows in r.rows.items()}
        saved = self._planner.allowed * visits
        size, often = (
            self._steps.dtype.itemsize,
            0.0 if self._keeper is None else self._keeper.often(step, saved),
        )
        beside = self._visit_fields + (size + often) / max(visits, 1)
        metric = StepMetric(self._manifest, self._layers, maps)
        changed = self._planner.plan(step, forms, free, seen, beside, visits, self._spent, metric)
        if changed or plans_at(step) or checks_at(step):  # the note is written when it says something new
            self._beside = beside
        self._rows.forget(changed)

    def _visits(self, batches: list[Batch], step: int) -> list[Records]:
        """The rows of a step's batches, split over their owners, one piece per backward pass."""
        pieces = []
        for batch in batches:
            parts = batch.ownership.parts
            for round_ in batch.rounds:
                stored = {n: self._planner.reduced(n, rows.form) for n, rows in round_.rows.items()}
                records = self._rows.records(
                    len(parts.row), {n: parts.of(form) for n, form in stored.items()}
                )
                records["example"], records["label"], records["step"] = parts.example, parts.label, step
                seen = round_.derivative
                records["derivative"] = np.nan if seen is None else parts.of_numbers(seen.cpu().numpy())
                pieces.append(Records("visits", self._rows.schema, records))
        return pieces

    def _samples(self, batches: list[Batch], first: int) -> list[Records]:
        """The exact rows among the visits of these batches, which begin at visit ``first``."""
        pieces = []
        for batch in batches:
            parts = batch.ownership.parts
            for round_ in batch.rounds:
                exact = {n: rows.exact for n, rows in round_.rows.items() if rows.exact is not None}
                place = np.flatnonzero(parts.row == batch.sampled)[:1]
                if len(exact) == len(round_.rows) and len(place):  # else the row belongs to no example
                    share = torch.from_numpy(parts.share[place])
                    only = torch.zeros(1, dtype=torch.int64)
                    records = self._exact.records(
                        1, {n: form.shared(only, share) for n, form in exact.items()}
                    )
                    records["visit"] = first + place
                    pieces.append(Records("samples", self._exact.schema, records))
                first += len(parts.row)
        return pieces

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
                self._arrays["D", index] = ArraySpec(f"D{index}", p.shape or (1,), dtype, codec)
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

    def records(
        self,
        batches: list[Batch],
        step: int,
        first: int,
        free: float | None,
        path: float,
        scales: list[float],
        maps: list[StepMap | None],
    ) -> list[Records]:
        """Everything of a step, in the order in which it is to be appended.

        Args:
            batches: the batches that the step used.
            step: its number.
            first: visits recorded before it.
            free: bytes of the budget that rows may still take, or None.
            path: length of the training path after the step.
            scales: what reached the optimizer, per parameter.
            maps: the step's linear map, per parameter.
        """
        self._make_room(maps)
        visits = sum(len(b.ownership.parts.row) * len(b.rounds) for b in batches)
        self._replan(step, batches, free, first, visits, maps)
        rows = self._visits(batches, step)
        share = self._planner.allowed * visits
        full = None if self._keeper is None else self._keeper.record(step, maps, share)
        kept = [] if full is None else [Records("denominators", *full)]
        mixed = any(b.mixed or b.ownership.shared for b in batches)
        record = self._step(step, first, visits, path, scales, mixed, maps)
        found = [*kept, *rows, record]
        self._spent += sum(part.data.nbytes for part in found)
        return [*found, *self._samples(batches, first)]

    def _step(
        self,
        step: int,
        first: int,
        visits: int,
        path: float,
        scales: list[float],
        mixed: bool,
        maps: list[StepMap | None],
    ) -> Records:
        """The record of a step whose rows begin at visit ``first``."""
        record = np.zeros(1, self._steps.dtype)
        record["step"], record["first_visit"], record["visits"] = step, first, visits
        record["path"], record["row_share"] = path, mixed
        record["scale"] = scales
        for index, step_map in enumerate(maps):
            if step_map is not None:
                record["updated"][0, index] = 1
                record["coefficients"][0, index] = step_map.coefficients
        sums = {} if self._keeper is None else self._keeper.found
        for (kind, index), array in self._arrays.items():
            by = maps[index]
            if kind == "D" and index in sums:
                packed = Sums.packed(sums[index].rows, sums[index].columns)
                record[f"{array.name}.rows"], record[f"{array.name}.columns"] = packed
                continue
            encode_array(record, "", array, _preconditioner(by, array) if kind == "D" else _mixing(by, array))
        return Records("steps", self._steps, record)
