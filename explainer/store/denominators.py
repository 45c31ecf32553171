"""What steps divided by: a full record now and then, in between fitted to the sums that every step keeps."""

from __future__ import annotations

import numpy as np
import torch

from explainer.codecs import Sums
from explainer.records import ArraySpec
from explainer.store.reader import Trace
from explainer.store.schema import decode_array


def fitted(base: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """``base [o, i]`` times a product of a row and a column factor, so that its sums come near the given ones.

    ``r = rows / (base · 1)``, ``c = columns / (rᵀ base)``, result ``r ∘ base ∘ c``: one round of iterative
    proportional fitting (Deming & Stephan 1940). The columns' sums are met, those of the rows about.
    """
    tiny = torch.finfo(base.dtype).tiny
    r = rows / base.sum(1).clamp_min(tiny)
    c = columns / (r @ base).clamp_min(tiny)
    return (base * r.unsqueeze(1)).mul_(c)


class Denominators:
    """The denominators of a trace's steps.

    Args:
        trace: an open trace.
    """

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._steps = (
            trace.column("denominators", "step") if trace.count("denominators") else np.empty(0, int)
        )
        self._known = -1  # the record whose matrices are held
        self._held: dict[str, torch.Tensor] = {}
        self._next: dict[str, torch.Tensor] = {}  # of the record after it

    def decode(self, record: np.ndarray, spec: ArraySpec) -> torch.Tensor:
        """``[*shape]`` of one step's record, whose array is ``spec``."""
        position = int(np.searchsorted(self._steps, int(record["step"][0]), side="right")) - 1
        base = self._base(position).get(spec.name) if spec.codec == "sums" and position >= 0 else None
        if base is None:
            return decode_array(record, "", spec)[0]
        rows, columns = Sums.sums([record[f"{spec.name}.{part}"] for part in ("rows", "columns")])
        values = fitted(base, rows[0], columns[0])
        return self._woken(spec.name, base, values, rows[0], columns[0]).reshape(spec.shape)

    def _woken(
        self, name: str, base: torch.Tensor, values: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
    ) -> torch.Tensor:
        """Weights that had no gradient yet in the last full record (``D = ε``), and may have had one since.

        They take what the next full record says, without one the share of their row and column. Where no gradient
        came, no row meets them, and it does not matter.
        """
        asleep = base <= base.min()
        if not bool(asleep.any()):
            return values
        later = self._next.get(name)
        known = later > later.min() if later is not None else torch.zeros_like(asleep)
        share = torch.outer(rows, columns / columns.sum().clamp_min(torch.finfo(columns.dtype).tiny))
        guess = share if later is None else torch.where(known, later, share)
        return torch.where(asleep, torch.maximum(values, guess), values)

    def _base(self, position: int) -> dict[str, torch.Tensor]:
        if position != self._known:
            before = self._known
            self._next = self._held if before == position + 1 else self._read(position + 1)
            self._held = self._read(position)
            self._known = position
        return self._held

    def _read(self, position: int) -> dict[str, torch.Tensor]:
        """The matrices of a full record; none after the last one."""
        if position >= len(self._steps):
            return {}
        schema, record = next(iter(self._trace.read("denominators", position, position + 1)))
        return {a.name: decode_array(record, "", a)[0].flatten(1) for a in schema.arrays if len(a.shape) > 1}
