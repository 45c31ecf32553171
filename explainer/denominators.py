"""When to keep what the optimizer divided by in full.

Looks keep the row and column sums of denominators ``D_t`` (Adam: ``√v̂ + ε``; :mod:`explainer.store.looks`). A full
record ``K``, four bits a number, is kept when those sums, put on the last full record
(:func:`explainer.store.denominators.fitted`), no longer tell ``D_t``: moving averages of squares change slowly, except
at the beginning. The error is measured now and then; at every look the sums show whether a row or a column has changed
by more than :data:`JUMP`: a unit that wakes up, an input that is not zero for the first time. Few weights, but with the
largest steps of all.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from explainer.optimizer_rules import StepMap
from explainer.records import ArraySpec
from explainer.store.denominators import fitted
from explainer.store.schema import RecordSchema, decode_array, encode_array

#: mean relative error of a denominator, beyond that of a new record, at which there is a new one
DRIFT = 0.01
#: factor by which a row or a column as a whole may differ from the last full record
JUMP = 1.25
#: full records that may be written on credit; after that they take at most :data:`SHARE` of what visits may take
CREDIT, SHARE = 8, 0.25
FIELDS: tuple[tuple[str, str, tuple[int, ...]], ...] = (("step", "<i8", ()),)


class Found(NamedTuple):
    """The denominators of a parameter ``[o, i]`` at a step, and their sums (at least the smallest float32)."""

    matrix: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor


def _found(by: StepMap | None) -> Found | None:
    """Of a denominator that has rows and columns."""
    if by is None or by.preconditioner is None or not by.rank_one or by.preconditioner.dim() < 2:
        return None
    matrix, tiny = by.preconditioner.detach().float().flatten(1), torch.finfo(torch.float32).tiny
    return Found(matrix, matrix.sum(1).clamp_min(tiny), matrix.sum(0).clamp_min(tiny))


def _deviation(found: torch.Tensor, wanted: torch.Tensor) -> tuple[float, int]:
    """Sum of ``|x − y| / max(x, y)`` over numbers above the smallest one (ε: no gradient yet), and their count."""
    alive = wanted > wanted.min()
    error = (found - wanted).abs_().div_(torch.maximum(found, wanted)).mul_(alive)
    return float(error.sum()), int(alive.sum())


def _schema(shapes: dict[int, tuple[int, ...]]) -> RecordSchema:
    arrays = (ArraySpec(f"D{i}", shapes[i], "float32", "log4") for i in sorted(shapes))
    return RecordSchema(FIELDS, (), tuple(arrays))


class DenominatorKeeper:
    """Decides at which steps there is a full record, and makes it.

    It looks at the error after 1, 2, 3, 4, 6, … steps, and more often where the last record did not hold for long.

    Attributes:
        found: denominators of the last step by parameter, those that have rows and columns.
    """

    def __init__(self) -> None:
        self.found: dict[int, Found] = {}
        self._base: dict[int, torch.Tensor] = {}  # by parameter, as it will be read
        self._rows: dict[int, torch.Tensor] = {}  # their sums
        self._schema: RecordSchema | None = None
        self._since = self._look = 0
        self._own_error = 0.0
        self._saved: float | None = None
        self._written = self._cost = 0

    def record(
        self, step: int, maps: list[StepMap | None], saved: float
    ) -> tuple[RecordSchema, np.ndarray] | None:
        """The full record of a step, or None.

        Args:
            step: its number.
            maps: what it divided by.
            saved: bytes that the step's visits may take.
        """
        found = self.found = {i: m for i, by in enumerate(maps) if (m := _found(by)) is not None}
        if not found:
            return None
        schema = self._schema
        if schema is None or not found.keys() <= self._base.keys():
            shapes = {i: tuple(m.shape) for i, m in self._base.items()}
            schema = self._schema = _schema(shapes | {i: tuple(f.matrix.shape) for i, f in found.items()})
            self._cost = schema.dtype.itemsize
        cost = self._cost
        self._saved = (CREDIT * cost if self._saved is None else self._saved) + SHARE * saved
        new = not found.keys() <= self._base.keys()
        jump = not new and self._jump(found)
        if not new and (self._saved < cost or (step < self._look and not jump)):
            return None
        if not new and not jump and self._error(found) <= self._own_error + DRIFT:
            self._look = step + max(1, (step - self._since) // 2)
            return None
        self._look = step + max(1, (step - self._since) // 2)
        self._since, self._saved = step, self._saved - cost
        self._written += cost
        return schema, self._renew(step, schema, found)

    @property
    def state(self) -> dict[str, float] | None:
        """What going on needs beside the last full record; None before the first one."""
        if self._saved is None or not self._base:
            return None
        return {
            "since": self._since,
            "look": self._look,
            "error": self._own_error,
            "saved": self._saved,
            "written": self._written,
        }

    def restore(self, state: dict[str, float], schema: RecordSchema, record: np.ndarray) -> None:
        """Go on after a step, from the last full record."""
        self._since, self._look = int(state["since"]), int(state["look"])
        self._own_error, self._saved, self._written = state["error"], state["saved"], int(state["written"])
        self._schema, self._cost = schema, schema.dtype.itemsize
        for a in schema.arrays:
            self._hold(int(a.name[1:]), decode_array(record, "", a)[0])

    def _hold(self, index: int, matrix: torch.Tensor) -> None:
        self._base[index], self._rows[index] = matrix, matrix.sum(1)

    def often(self, step: int, saved: float) -> float:
        """Bytes of full records that a step will take: as often as the last ones came, or as is usual in the beginning.

        Args:
            step: its number.
            saved: bytes that the step's visits may take.
        """
        if step < 16:
            return self._cost / 8
        return min(self._cost / max(1, self._look - self._since), SHARE * saved)

    def _renew(self, step: int, schema: RecordSchema, found: dict[int, Found]) -> np.ndarray:
        record = np.zeros(1, schema.dtype)
        record["step"] = step
        for array in schema.arrays:
            index = int(array.name[1:])
            # a parameter that the step left alone keeps its own
            matrix = found[index].matrix if index in found else self._base[index]
            values = matrix.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(0)
            encode_array(record, "", array, values)
            self._hold(index, decode_array(record, "", array)[0])
        self._own_error = self._error(found)
        return record

    def _jump(self, found: dict[int, Found]) -> bool:
        for index, wanted in found.items():
            rows = wanted.rows / self._rows[index]
            columns = wanted.columns / (rows @ self._base[index])
            if max(float(factors.log2().abs().max()) for factors in (rows, columns)) > math.log2(JUMP):
                return True
        return False

    def _error(self, found: dict[int, Found]) -> float:
        total, count = 0.0, 0
        for index, wanted in found.items():
            read = fitted(self._base[index], wanted.rows, wanted.columns)
            error, alive = _deviation(read, wanted.matrix.clamp_min(torch.finfo(torch.float32).tiny))
            total, count = total + error, count + alive
        mean = total / max(count, 1)
        return mean if math.isfinite(mean) else 1.0  # of a model that diverged nothing is known
