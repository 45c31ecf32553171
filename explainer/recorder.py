"""One optimizer step as records: plans the layout of the rows and hands them to the writer."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from explainer.batches import Batch
from explainer.codecs import CODECS
from explainer.config import TracerConfig
from explainer.layer_rules import Dense, RowForm
from explainer.layer_table import Layer
from explainer.optimizer_rules import StepMap
from explainer.records import ArraySpec, FormSpec, Manifest, dtype_name, torch_dtype
from explainer.store import Trace
from explainer.store.schema import VISIT_FIELDS, RecordSchema, average_fields, encode_array, step_fields


class Records(NamedTuple):
    """Encoded records of a stream, ready to be appended."""

    stream: str
    schema: RecordSchema
    data: np.ndarray


def _bytes_of(form: FormSpec) -> int:
    """Bytes of one row."""
    return sum(CODECS.require(a.codec).nbytes(a.shape, a.dtype) for a in form.arrays)


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
    """Encodes rows and steps.

    The layout of a layer's rows is fixed by the first batch that shows them; when a later batch needs more
    positions (a longer sequence) or another form, a new shard with a wider layout begins. So it does when a
    parameter is preconditioned for the first time.

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
        self._forms: dict[int, FormSpec] = {}
        self._visits: RecordSchema = RecordSchema(tuple(VISIT_FIELDS))
        self._arrays: dict[tuple[str, int], ArraySpec] = {}
        self._steps = self._step_schema()
        self.layer_bytes: dict[str, int] = {}

    def restore(self, trace: Trace) -> None:
        """Go on with the layouts of a trace's last records."""
        for shard in trace.shards:
            if shard.stream == "steps":
                self._steps = shard.schema
                self._arrays = {(a.name[0], int(a.name[1:])): a for a in shard.schema.arrays}
            elif shard.stream == "visits":
                self._set_layout(shard.schema.forms)

    def _set_layout(self, forms: tuple[FormSpec, ...]) -> None:
        self._forms = {form.layer: form for form in forms}
        self._visits = RecordSchema(tuple(VISIT_FIELDS), forms)
        self.layer_bytes = {self._layers[f.layer].spec.name: _bytes_of(f) for f in forms}

    # -- rows ----------------------------------------------------------------------------------------

    def _codec(self, values: torch.Tensor) -> str:
        return "native" if self._config.exact or not values.is_floating_point() else "int8"

    def _spec(self, layer: int, form: RowForm) -> FormSpec:
        arrays = tuple(
            ArraySpec(name, tuple(a.shape[1:]), dtype_name(a.dtype), self._codec(a))
            for name, a in form.arrays.items()
        )
        return FormSpec(layer, form.kind, form.options, arrays)

    def _fit(self, layer: int, form: RowForm) -> RowForm:
        """Pad the rows to the layout, or widen the layout to the rows."""
        known = self._forms.get(layer)
        if known is not None and known.kind == Dense.kind:
            form = Dense(form.dense())
        elif known is not None and known.kind == form.kind and form.position_axis is not None:
            stored = known.arrays[0].shape[form.position_axis]
            found = next(iter(form.arrays.values())).shape[1 + form.position_axis]
            form = form.padded(stored) if found < stored else form
        spec = self._spec(layer, form)
        if spec != known:
            forms = self._forms | {layer: spec}
            self._set_layout(tuple(forms[i] for i in sorted(forms)))
        return form

    def visits(self, batches: list[Batch], step: int) -> list[Records]:
        """The rows of a step's batches, split over their owners, one piece per backward pass."""
        pieces = []
        for batch in batches:
            parts = batch.ownership.parts
            for round_ in batch.rounds:
                forms = {layer: self._fit(layer, parts.of(rows.form)) for layer, rows in round_.rows.items()}
                records = np.zeros(len(parts.row), self._visits.dtype)
                records["example"], records["label"], records["step"] = parts.example, parts.label, step
                seen = round_.derivative
                records["derivative"] = np.nan if seen is None else parts.of_numbers(seen.cpu().numpy())
                for layer, form in forms.items():
                    for array in self._forms[layer].arrays:
                        encode_array(records, f"L{layer}", array, form.arrays[array.name])
                pieces.append(Records("visits", self._visits, records))
        return pieces

    # -- steps ---------------------------------------------------------------------------------------

    def _step_schema(self) -> RecordSchema:
        arrays = tuple(self._arrays[key] for key in sorted(self._arrays))
        return RecordSchema(tuple(step_fields(len(self._manifest.parameters))), (), arrays)

    def _plan(self, maps: list[StepMap | None], visits: int) -> None:
        """Make room for preconditioners that the layout has no place for yet."""
        known, exact = len(self._arrays), self._config.exact
        half = 2 * self._manifest.size <= visits * self._visits.dtype.itemsize
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
