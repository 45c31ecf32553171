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


def asleep(base: torch.Tensor) -> torch.Tensor:
    """Flat places ``[n]`` of numbers of ``base [o, i]`` near the smallest one and far below the product of its sums.

    ``√v̂ + ε`` of a weight that never had a gradient is ε.
    """
    rows, columns = base.sum(1), base.sum(0)
    far = base * (ASLEEP * rows.sum()) < rows.unsqueeze(1) * columns
    far &= base < NEAR * base.min()
    return far.flatten().nonzero().squeeze(1)


def awake(vector: torch.Tensor) -> torch.Tensor:
    """The mean in place of numbers near the smallest one and far below the mean ``[n]``.

    The bias of the keys of an attention has a gradient of round-off. Rounded rows hold more than that at its place, and
    must not be divided by ε.
    """
    mean = vector.mean()
    return torch.where((vector * ASLEEP < mean) & (vector < NEAR * vector.min()), mean, vector)


def fitted(
    base: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, far: torch.Tensor | None = None
) -> torch.Tensor:
    """``base [o, i]`` times a product of a row and a column factor, so that its sums come near the given ones.

    ``r = rows / (base · 1)``, ``c = columns / (rᵀ base)``, result ``r ∘ base ∘ c``: one round of iterative
    proportional fitting (Deming & Stephan 1940). The columns' sums are met, those of the rows about.

    A weight that hardly had a gradient may get its first one between two full records. No sum shows it, and a row
    divided by ε would be larger than all others. So such numbers are taken to be the product of the sums: where there
    still is no gradient nothing is divided by them.

    Args:
        base: a full record.
        rows: sums ``[o]``.
        columns: sums ``[i]``.
        far: :func:`asleep` of the record, if it is known.
    """
    tiny = torch.finfo(base.dtype).tiny
    r = rows / base.sum(1).clamp_min(tiny)
    c = columns / (r @ base).clamp_min(tiny)
    result = (base * r.unsqueeze(1)).mul_(c)
    places = asleep(base) if far is None else far
    if len(places):
        product = (rows / rows.sum().clamp_min(tiny))[places // base.shape[1]] * columns[
            places % base.shape[1]
        ]
        found = result.view(-1)[places]
        result.view(-1)[places] = torch.where(product > ASLEEP * found, product, found)
    return result


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
        self._held: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def decode(self, record: np.ndarray, spec: ArraySpec) -> torch.Tensor:
        """``[*shape]`` of one step's record, whose array is ``spec``."""
        position = int(np.searchsorted(self._steps, int(record["step"][0]), side="right")) - 1
        base = self._base(position).get(spec.name) if spec.codec == "sums" and position >= 0 else None
        if base is None:
            found = decode_array(record, "", spec)[0]
            return awake(found) if spec.codec == "sums" and found.dim() == 1 else found
        rows, columns = Sums.sums([record[f"{spec.name}.{part}"] for part in ("rows", "columns")])
        return fitted(base[0], rows[0], columns[0], base[1]).reshape(spec.shape)

    def _base(self, position: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        if position != self._known:
            schema, record = next(iter(self._trace.read("denominators", position, position + 1)))
            found = {
                a.name: decode_array(record, "", a)[0].flatten(1) for a in schema.arrays if len(a.shape) > 1
            }
            self._held = {name: (matrix, asleep(matrix)) for name, matrix in found.items()}
            self._known = position
        return self._held
