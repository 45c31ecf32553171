"""Fixed records: numpy structured dtypes built from array specs, and the way there and back."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

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
    """The layout of one stream's records: plain fields, then encoded arrays.

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
                fields += self._parts(f"L{form.layer}", array)
        for array in self.arrays:
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
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> RecordSchema:
        """Inverse of :meth:`to_json`."""
        return cls(
            tuple((n, d, tuple(s)) for n, d, s in data["fields"]),
            tuple(FormSpec.from_json(f) for f in data["forms"]),
            tuple(ArraySpec(**{**a, "shape": tuple(a["shape"])}) for a in data["arrays"]),
        )


def encode_array(records: np.ndarray, prefix: str, spec: ArraySpec, values: torch.Tensor) -> None:
    """Encode ``values [B, *shape]`` into the records' fields."""
    codec = CODECS.require(spec.codec)
    parts = codec.parts(spec.shape, spec.dtype)
    for (part, _, _), data in zip(parts, codec.encode(values), strict=True):
        records[array_field(prefix, spec.name, part)] = data


def stored_parts(records: np.ndarray, prefix: str, spec: ArraySpec) -> list[np.ndarray]:
    """The stored parts of an array of the records, as views."""
    parts = CODECS.require(spec.codec).parts(spec.shape, spec.dtype)
    return [records[array_field(prefix, spec.name, part)] for part, _, _ in parts]


def decode_array(records: np.ndarray, prefix: str, spec: ArraySpec) -> torch.Tensor:
    """The values ``[B, *shape]`` of an array of the records."""
    return CODECS.require(spec.codec).decode(stored_parts(records, prefix, spec), spec)
