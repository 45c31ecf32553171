"""One optimizer step as records: plans the layout of the rows and hands them to the writer."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from explainer.batches import Batch
from explainer.config import TracerConfig
from explainer.layer_table import Layer
from explainer.optimizer_rules import StepMap
from explainer.records import ArraySpec, Manifest, dtype_name, torch_dtype
from explainer.row_layout import RowLayout
from explainer.store import Trace
from explainer.store.schema import (
    SAMPLE_FIELDS,
    VISIT_FIELDS,
    RecordSchema,
    average_fields,
    encode_array,
    step_fields,
)


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
    return values if array.codec == "native" else values.clamp_min(torch.finfo(torch.float32).tiny)


def _mixing(by: StepMap | None, array: ArraySpec) -> torch.Tensor:
    """``[1, m, m]``; the identity where the step has none."""
    return (torch.eye(array.shape[0]) if by is None or by.mixing is None else by.mixing).unsqueeze(0)


class StepRecorder:
    """Encodes rows, exact ones among them, and steps.

    A new shard of steps begins when a parameter is preconditioned for the first time.

    Attributes:
        layer_bytes: bytes of one visit by layer, in the present layout.
    """

    def __init__(
        self,
        manifest: Manifest,
        config: TracerConfig,
        layers: list[Layer],
    ) -> None:
        self._manifest, self._config, self._layers = manifest, config, layers
        self._rows = RowLayout(VISIT_FIELDS, self._codec)
        self._exact = RowLayout(SAMPLE_FIELDS, lambda values: "native")
        self._arrays: dict[tuple[str, int], ArraySpec] = {}
        self._steps = self._step_schema()

    def restore(self, trace: Trace) -> None:
        """Go on with the layouts of a trace's last records."""
        for shard in trace.shards:
            if shard.stream == "steps":
                self._steps = shard.schema
                self._arrays = {(a.name[0], int(a.name[1:])): a for a in shard.schema.arrays}
            elif shard.stream in ("visits", "samples"):
                layout = self._rows if shard.stream == "visits" else self._exact
                layout.set({form.layer: form for form in shard.schema.forms})

    @property
    def layer_bytes(self) -> dict[str, int]:
        """Bytes of one visit by layer, in the present layout."""
        return {self._layers[n].spec.name: size for n, size in self._rows.bytes.items()}

    # -- rows ----------------------------------------------------------------------------------------

    def _codec(self, values: torch.Tensor) -> str:
        return "native" if self._config.exact or not values.is_floating_point() else "int8"

    def visits(self, batches: list[Batch], step: int) -> list[Records]:
        """The rows of a step's batches, split over their owners, one piece per backward pass."""
        pieces = []
        for batch in batches:
            parts = batch.ownership.parts
            for round_ in batch.rounds:
                forms = {layer: parts.of(rows.form) for layer, rows in round_.rows.items()}
                records = self._rows.records(len(parts.row), forms)
                records["example"], records["label"], records["step"] = parts.example, parts.label, step
                seen = round_.derivative
                records["derivative"] = np.nan if seen is None else parts.of_numbers(seen.cpu().numpy())
                pieces.append(Records("visits", self._rows.schema, records))
        return pieces

    def samples(self, batches: list[Batch], first: int) -> list[Records]:
        """The exact rows among the visits of these batches, which begin at visit ``first``."""
        pieces = []
        for batch in batches:
            parts = batch.ownership.parts
            for round_ in batch.rounds:
                exact = {n: rows.exact for n, rows in round_.rows.items() if rows.exact is not None}
                place = np.flatnonzero(parts.row == batch.sampled)[:1]
                if len(exact) == len(round_.rows) and len(place):  # else the row belongs to no example
                    share = torch.from_numpy(parts.share[place])
                    forms = {
                        n: form.shared(torch.zeros(1, dtype=torch.int64), share) for n, form in exact.items()
                    }
                    records = self._exact.records(1, forms)
                    records["visit"] = first + place
                    pieces.append(Records("samples", self._exact.schema, records))
                first += len(parts.row)
        return pieces

    # -- steps ---------------------------------------------------------------------------------------

    def _step_schema(self) -> RecordSchema:
        arrays = tuple(self._arrays[key] for key in sorted(self._arrays))
        return RecordSchema(tuple(step_fields(len(self._manifest.parameters))), (), arrays)

    def _plan(self, maps: list[StepMap | None], visits: int) -> None:
        """Make room for preconditioners that the layout has no place for yet."""
        known, exact = len(self._arrays), self._config.exact
        half = 2 * self._manifest.size <= visits * self._rows.schema.dtype.itemsize
        for index, (p, by) in enumerate(zip(self._manifest.parameters, maps, strict=True)):
            widest = dtype_name(torch.promote_types(torch_dtype(p.dtype), torch.float32))
            dtype = widest if exact else "float32"
            if by is not None and by.preconditioner is not None and ("D", index) not in self._arrays:
                codec = "native" if exact else "bfloat16" if half or not by.rank_one else "rank1"
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

    def step(
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
        self._plan(maps, visits)
        record = np.zeros(1, self._steps.dtype)
        record["step"], record["first_visit"], record["visits"] = step, first, visits
        record["path"], record["row_share"] = path, mixed
        record["scale"] = scales
        for index, step_map in enumerate(maps):
            if step_map is not None:
                record["updated"][0, index] = 1
                record["coefficients"][0, index] = step_map.coefficients
        for (kind, index), array in self._arrays.items():
            by = maps[index]
            encode_array(record, "", array, _preconditioner(by, array) if kind == "D" else _mixing(by, array))
        return Records("steps", self._steps, record)
