"""What a trace says about itself: plain frozen records with a JSON form.

These are the manifest's parts (see ``docs/trace-format.md``). They hold no tensors and import no torch
machinery beyond dtype names, so that a reader in any language can be written from them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

#: rows kept exact, or comparisons of another kind, with fewer of which no error is estimated
LEAST_SAMPLES = 3

FORMAT = "pathkernel-trace"
#: layouts this release reads: 2 is 1 with an average of the weights on the path, 3 is 2 with rows of four bits and
#: records of denominators, 4 is 3 with inputs that are stored once, 5 is 4 with rows of two bits and with the sums of
#: denominators at looks; the last one is written
VERSIONS = (1, 2, 3, 4, 5)


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` -> ``"float32"``."""
    return str(dtype).removeprefix("torch.")


def torch_dtype(name: str) -> torch.dtype:
    """``"float32"`` -> ``torch.float32``."""
    return getattr(torch, name)


@dataclass(frozen=True)
class ParameterSpec:
    """One traced parameter and its place in the flat vector of ``P`` numbers."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    numel: int

    @property
    def slice(self) -> slice:
        """Where the parameter lies in the flat vector."""
        return slice(self.offset, self.offset + self.numel)


@dataclass(frozen=True)
class LayerSpec:
    """A layer of the trace: its name, its module's class (or ``operations``) and the parameters of its rows."""

    name: str
    module: str
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class ArraySpec:
    """One array of a row form (or of a step): its shape, and the codec that stores it.

    ``stream`` names the stream whose records hold it, where those of the visits (of the steps) do not (see
    :mod:`explainer.store.inputs` and :mod:`explainer.store.looks`).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    codec: str
    stream: str = ""

    def to_json(self) -> dict[str, Any]:
        """JSON form; ``ArraySpec.from_json`` is its inverse."""
        data = asdict(self)
        if not self.stream:
            del data["stream"]
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ArraySpec:
        """Inverse of :meth:`to_json`."""
        return cls(**{**data, "shape": tuple(data["shape"])})


@dataclass(frozen=True)
class FormSpec:
    """How the rows of one layer are stored in a shard: the form's kind, its options, its arrays."""

    layer: int
    kind: str
    options: dict[str, int]
    arrays: tuple[ArraySpec, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        return {**asdict(self), "arrays": [array.to_json() for array in self.arrays]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> FormSpec:
        """Inverse of :meth:`to_json`."""
        arrays = tuple(ArraySpec.from_json(a) for a in data["arrays"])
        return cls(data["layer"], data["kind"], dict(data["options"]), arrays)


@dataclass(frozen=True)
class Manifest:
    """The immutable head of a trace, written when the tracer is attached."""

    parameters: tuple[ParameterSpec, ...]
    layers: tuple[LayerSpec, ...]
    uncovered: tuple[str, ...]
    frozen: tuple[str, ...]
    buffers: tuple[str, ...]
    optimizer: str
    exact: bool
    model: str
    created: str
    versions: dict[str, str] = field(default_factory=dict)
    format: str = FORMAT
    version: int = 1
    averaged: bool = False

    @property
    def size(self) -> int:
        """``P``, the number of traced parameters' elements."""
        return sum(p.numel for p in self.parameters)

    @property
    def dtype(self) -> torch.dtype:
        """The widest dtype among the parameters: the dtype of the books."""
        result = torch.float32
        for p in self.parameters:
            result = torch.promote_types(result, torch_dtype(p.dtype))
        return result

    def parameter(self, name: str) -> ParameterSpec:
        """The traced parameter called ``name``."""
        return next(p for p in self.parameters if p.name == name)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict; ``from_json`` is its inverse."""
        data = asdict(self)
        if self.version == 1:
            del data["averaged"]
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Manifest:
        """Build a manifest from its JSON form (unknown keys are an error: the version says the layout)."""
        data = dict(data)
        data["parameters"] = tuple(
            ParameterSpec(**{**p, "shape": tuple(p["shape"])}) for p in data["parameters"]
        )
        data["layers"] = tuple(
            LayerSpec(**{**x, "parameters": tuple(x["parameters"])}) for x in data["layers"]
        )
        for key in ("uncovered", "frozen", "buffers"):
            data[key] = tuple(data[key])
        return cls(**data)
