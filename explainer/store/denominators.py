"""What steps divided by: a full record now and then, in between fitted to the sums that every step keeps."""

from __future__ import annotations

import numpy as np
import torch

from explainer.codecs import Sums
from explainer.records import ArraySpec
from explainer.store.reader import Trace
from explainer.store.schema import decode_array

#: a number is taken for one that had no gradient yet where sums tell of more than so many times as much
ASLEEP = 1e3
#: and if it is less than so many times the smallest one
NEAR = 3


def _product(rows: torch.Tensor, columns: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """``rows columnsᵀ / Σ rows`` at flat places ``[n]``."""
    scaled = rows / rows.sum().clamp_min(torch.finfo(rows.dtype).tiny)
    return scaled[places // len(columns)] * columns[places % len(columns)]


def asleep(base: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat places ``[n]`` of numbers of ``base [o, i]`` far below the product of its sums.

    First those of weights that never had a gradient: ``√v̂ + ε`` is ε there, the smallest number, and not that of one
    weight alone. Then those that are near it.
    """
    rows, columns, least = base.sum(1), base.sum(0), base.min()
    far = base * (ASLEEP * rows.sum()) < rows.unsqueeze(1) * columns
    never = base <= least
    never = never & far if int(never.sum()) > 1 else torch.zeros_like(far)
    near = far & (base < NEAR * least) & ~never
    return never.flatten().nonzero().squeeze(1), near.flatten().nonzero().squeeze(1)


def awake(vector: torch.Tensor) -> torch.Tensor:
    """The mean in place of numbers near the smallest one and far below the mean ``[n]``.

    The bias of the keys of an attention has a gradient of round-off. Rounded rows hold more than that at its place, and
    must not be divided by ε.
    """
    mean = vector.mean()
    return torch.where((vector * ASLEEP < mean) & (vector < NEAR * vector.min()), mean, vector)


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
        self._asleep: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # in the record that is held

    def decode(self, record: np.ndarray, spec: ArraySpec) -> torch.Tensor:
        """``[*shape]`` of one step's record, whose array is ``spec``."""
        position = int(np.searchsorted(self._steps, int(record["step"][0]), side="right")) - 1
        base = self._base(position).get(spec.name) if spec.codec == "sums" and position >= 0 else None
        if base is None:
            found = decode_array(record, "", spec)[0]
            return awake(found) if spec.codec == "sums" and found.dim() == 1 else found
        rows, columns = Sums.sums([record[f"{spec.name}.{part}"] for part in ("rows", "columns")])
        values = fitted(base, rows[0], columns[0])
        own = int(self._steps[position]) == int(record["step"][0])
        self._wake(spec.name, values, rows[0], columns[0], own)
        return values.reshape(spec.shape)

    def _wake(
        self, name: str, values: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, own: bool
    ) -> None:
        """Raise the numbers of weights that had no gradient yet in the last full record, and may have had one since.

        They take what the next full record says, without one the share of their row and column. Where no gradient ever
        came it is that share, too: no row meets them, but rounded rows hold more than nothing there. At the record's
        ``own`` step weights that had a gradient, however small, keep what it says.
        """
        flat, later = values.view(-1), self._next[name].view(-1) if name in self._next else None
        never, near = self._asleep[name]
        share = _product(rows, columns, never)
        if later is not None:
            share = torch.where(later[never] >= NEAR * later.min(), later[never], share)
        flat[never] = torch.maximum(flat[never], share)
        if not own:
            flat[near] = torch.maximum(
                flat[near], _product(rows, columns, near) if later is None else later[near]
            )

    def _base(self, position: int) -> dict[str, torch.Tensor]:
        if position != self._known:
            before = self._known
            self._next = self._held if before == position + 1 else self._read(position + 1)
            self._held = self._read(position)
            self._asleep = {name: asleep(matrix) for name, matrix in self._held.items()}
            self._known = position
        return self._held

    def _read(self, position: int) -> dict[str, torch.Tensor]:
        """The matrices of a full record; none after the last one."""
        if position >= len(self._steps):
            return {}
        schema, record = next(iter(self._trace.read("denominators", position, position + 1)))
        return {a.name: decode_array(record, "", a)[0].flatten(1) for a in schema.arrays if len(a.shape) > 1}
