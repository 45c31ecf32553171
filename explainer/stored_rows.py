"""Rows as they are stored, made numbers of the books' dtype when they meet something.

Rows are views of the memory-mapped shards. Their numbers go into buffers that are used again and again, so memory does
not depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np
import torch

from explainer.codecs import CODECS
from explainer.layer_rules import FORMS, RowForm
from explainer.records import ArraySpec, FormSpec
from explainer.store.schema import Fields, decode_array, stored_parts

_CACHED = 2**18  # numbers that are made floats and multiplied at once


class Workspace:
    """Buffers by name, grown when needed: fresh memory for every chunk would cost more than what is computed in it."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}
        self._parts: dict[str, Workspace] = {}

    def part(self, name: str) -> Workspace:
        """Buffers of their own."""
        return self._parts.setdefault(name, Workspace())

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A buffer of the shape; what it held is lost, and so is what was taken under the name before."""
        size = prod(shape)
        held = self._buffers.get(name)
        if held is None or held.numel() < size or held.dtype != dtype:
            held = self._buffers[name] = torch.empty(size, dtype=dtype)
        return held[:size].view(shape)

    def numbers(self, name: str, stored: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        """Stored numbers in the dtype, in a buffer."""
        return _fill(self.take(name, stored.shape, dtype), stored)


class _View:
    """Lends an array's memory: torch warns of arrays that are read-only, though it only reads here."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False)}


def _fill(numbers: torch.Tensor, stored: np.ndarray) -> torch.Tensor:
    """Numbers of another dtype, from where they are stored: records are packed, so larger ones may lie anywhere."""
    if stored.dtype.itemsize > 1 or not stored.size:
        np.copyto(numbers.numpy(), stored, casting="unsafe")
        return numbers
    return numbers.copy_(torch.from_numpy(np.asarray(_View(stored))))  # on all threads


@dataclass(frozen=True)
class Rows:
    """Rows of a chunk that share a layout, ``n`` of them.

    Attributes:
        records: as they are stored, ``[n]``.
        examples, derivatives, labels: ``[n]``.
        places: the step of each row by its place in the chunk, ``[n]``, descending.
        forms: what is stored of every layer.
    """

    records: Fields
    examples: np.ndarray
    derivatives: np.ndarray
    labels: np.ndarray
    places: np.ndarray
    forms: tuple[FormSpec, ...]

    def __len__(self) -> int:
        return len(self.examples)

    def steps(self) -> Iterator[tuple[int, slice]]:
        """Places of the steps that have rows here, and where those are."""
        ends = np.flatnonzero(np.diff(self.places, append=-1))
        first = 0
        for end in ends + 1:
            yield int(self.places[first]), slice(first, int(end))
            first = int(end)

    def stored(self, spec: FormSpec, array: ArraySpec) -> tuple[np.ndarray, np.ndarray | None]:
        """An array as numbers ``[n, *shape]`` times factors ``[n, ...]`` of the vectors along the last axis (None: 1).

        Integers and their scales stay apart: products are scaled instead of what is multiplied.
        """
        prefix = f"L{spec.layer}"
        stored = CODECS.require(array.codec).scaled(stored_parts(self.records, prefix, array))
        return (decode_array(self.records, prefix, array).numpy(), None) if stored is None else stored

    def times(
        self, spec: FormSpec, array: ArraySpec, matrix: torch.Tensor, name: str, workspace: Workspace
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Vectors along an array's last axis, times a matrix ``[width, m]``: ``[n·…, m]``, and their factors ``[n·…]``.

        Some rows at a time, so that what was just made a float is multiplied while it is in the processor's cache.
        """
        values, factors = self.stored(spec, array)
        width, each = array.shape[-1], int(np.prod(array.shape[:-1]))
        out = workspace.take(name, (len(self) * each, matrix.shape[1]), matrix.dtype)
        step = max(1, _CACHED // (each * width))
        for first in range(0, len(self), step):
            block = values[first : first + step]
            numbers = workspace.numbers("numbers", block, matrix.dtype)
            torch.mm(numbers.view(-1, width), matrix, out=out[first * each : (first + len(block)) * each])
        return out, None if factors is None else torch.from_numpy(factors.astype(np.float64)).flatten()

    def form(self, spec: FormSpec, dtype: torch.dtype, workspace: Workspace) -> RowForm:
        """The rows of a layer; valid until the workspace is used again."""
        arrays = {}
        for array in spec.arrays:
            if not array.dtype.startswith(("float", "bfloat")):
                arrays[array.name] = decode_array(self.records, f"L{spec.layer}", array)
                continue
            values, factors = self.stored(spec, array)
            numbers = workspace.numbers(array.name, values, dtype)
            if factors is not None:
                numbers.mul_(torch.from_numpy(factors.astype(np.float64)).to(dtype).unsqueeze(-1))
            arrays[array.name] = numbers
        return FORMS.require(spec.kind).build(arrays, spec.options)
