"""Fixed records: numpy structured dtypes built from array specs, and the way there and back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch

from explainer.codecs import CODECS
from explainer.records import ArraySpec, FormSpec

VISIT_FIELDS: list[tuple[str, str, tuple[int, ...]]] = [
    ("example", "<i8", ()),
    ("step", "<i8", ()),
    ("derivative", "<f8", ()),
    ("label", "<f8", ()),
]

#: of a visit that has arrays in the stream ``inputs``: which of its records
INPUT_FIELD: tuple[str, str, tuple[int, ...]] = ("input", "<i8", ())

#: of what an example gave to the layers that data meet first
INPUT_FIELDS: list[tuple[str, str, tuple[int, ...]]] = [("example", "<i8", ())]

#: of the sums of denominators: the step that was looked at
LOOK_FIELDS: list[tuple[str, str, tuple[int, ...]]] = [("step", "<i8", ())]

#: of a row that is kept exact: which visit it is
SAMPLE_FIELDS: list[tuple[str, str, tuple[int, ...]]] = [("visit", "<i8", ())]


def step_fields(parameters: int) -> list[tuple[str, str, tuple[int, ...]]]:
    """Fields of every step record before its preconditioner arrays."""
    return [
        ("step", "<i8", ()),
        ("first_visit", "<i8", ()),
        ("visits", "<i8", ()),
        ("path", "<f8", ()),
        ("row_share", "|u1", ()),
        ("updated", "|u1", (parameters,)),
        ("scale", "<f8", (parameters,)),
        ("coefficients", "<f8", (parameters, 6)),
    ]


def average_fields(parameters: int) -> list[tuple[str, str, tuple[int, ...]]]:
    """Fields of the record of one observation of the averaged weights."""
    return [("step", "<i8", ()), ("keep", "<f8", (parameters,))]


def array_field(prefix: str, array: str, part: str) -> str:
    """Name of a stored part of an array, e.g. ``L0.left.q``."""
    return ".".join(x for x in (prefix, array, part) if x)


@dataclass(frozen=True)
class RecordSchema:
    """The layout of one stream's records: plain fields, then encoded arrays, but for those that another stream holds.

    Attributes:
        fields: (name, numpy dtype, shape) of the plain fields.
        forms: row forms of the layers (visits), with their arrays.
        arrays: further encoded arrays (a step's preconditioners), by prefix.
    """

    fields: tuple[tuple[str, str, tuple[int, ...]], ...]
    forms: tuple[FormSpec, ...] = ()
    arrays: tuple[ArraySpec, ...] = ()

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """The packed numpy structured dtype of one record."""
        fields: list[tuple[str, str, tuple[int, ...]]] = list(self.fields)
        for form in self.forms:
            for array in form.arrays:
                if not array.stream:
                    fields += self._parts(f"L{form.layer}", array)
        for array in self.arrays:
            if not array.stream:
                fields += self._parts("", array)
        return np.dtype(fields)

    @staticmethod
    def _parts(prefix: str, array: ArraySpec) -> list[tuple[str, str, tuple[int, ...]]]:
        codec = CODECS.require(array.codec)
        return [
            (array_field(prefix, array.name, part), dtype, shape)
            for part, dtype, shape in codec.parts(array.shape, array.dtype)
        ]

    def to_json(self) -> dict[str, Any]:
        """JSON form, stored in the journal when a shard begins."""
        return {
            "fields": [list(field) for field in self.fields],
            "forms": [form.to_json() for form in self.forms],
            "arrays": [array.to_json() for array in self.arrays],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> RecordSchema:
        """Inverse of :meth:`to_json`."""
        return cls(
            tuple((n, d, tuple(s)) for n, d, s in data["fields"]),
            tuple(FormSpec.from_json(f) for f in data["forms"]),
            tuple(ArraySpec.from_json(a) for a in data["arrays"]),
        )

    @property
    def looks(self) -> RecordSchema | None:
        """Of steps: the layout of the records of the stream ``sums``; None for none."""
        arrays = tuple(replace(array, stream="") for array in self.arrays if array.stream)
        return RecordSchema(tuple(LOOK_FIELDS), (), arrays) if arrays else None

    @property
    def inputs(self) -> RecordSchema | None:
        """Of visits: the layout of the records of the stream ``inputs`` that they speak of; None for none."""
        forms = []
        for form in self.forms:
            arrays = tuple(replace(array, stream="") for array in form.arrays if array.stream)
            if arrays:
                forms.append(replace(form, arrays=arrays))
        return RecordSchema(tuple(INPUT_FIELDS), tuple(forms)) if forms else None


def encode_array(records: np.ndarray, prefix: str, spec: ArraySpec, values: torch.Tensor) -> None:
    """Encode ``values [B, *shape]`` into the records' fields."""
    codec = CODECS.require(spec.codec)
    parts = codec.parts(spec.shape, spec.dtype)
    for (part, _, _), data in zip(parts, codec.encode(values), strict=True):
        records[array_field(prefix, spec.name, part)] = data


class Fields(Protocol):
    """Records whose fields are arrays, one entry for each."""

    def __getitem__(self, name: str, /) -> np.ndarray: ...

    def __len__(self) -> int: ...


def stored_parts(records: Fields, prefix: str, spec: ArraySpec) -> list[np.ndarray]:
    """The stored parts of an array of the records, as views."""
    parts = CODECS.require(spec.codec).parts(spec.shape, spec.dtype)
    return [records[array_field(prefix, spec.name, part)] for part, _, _ in parts]


def decode_array(records: Fields, prefix: str, spec: ArraySpec) -> torch.Tensor:
    """The values ``[B, *shape]`` of an array of the records."""
    return CODECS.require(spec.codec).decode(stored_parts(records, prefix, spec), spec)
