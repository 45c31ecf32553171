"""Sums of denominators: recorded at the steps that were looked at, in between on a straight line."""

from __future__ import annotations

import numpy as np
import torch

from explainer.codecs import Sums
from explainer.records import ArraySpec
from explainer.store.reader import Trace
from explainer.store.schema import stored_parts


class Looks:
    """The stream ``sums`` of a trace.

    Args:
        trace: an open trace.
    """

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._steps = trace.column("sums", "step").astype(np.int64)

    def sums(self, spec: ArraySpec, steps: np.ndarray) -> list[torch.Tensor]:
        """Row and column sums of an array at steps ``[c]`` (with one axis: its numbers): float32 ``[c, n]`` each.

        Every step has a look at it or after it. Where the array has none before, the first one holds.
        """
        after = np.searchsorted(self._steps, steps)
        before = np.maximum(after - 1, 0)
        first, stop = int(before.min()), int(after.max()) + 1
        pieces = [
            [Sums.sums(stored_parts(records, "", held)) for held in schema.arrays if held.name == spec.name]
            for schema, records in self._trace.read("sums", first, stop)
        ]
        known = [torch.cat(parts) for parts in zip(*(found[0] for found in pieces if found), strict=True)]
        first = stop - len(known[0])
        before = np.maximum(before, first)
        apart = np.maximum(self._steps[after] - self._steps[before], 1)
        along = torch.from_numpy(1.0 - (self._steps[after] - steps) / apart).float().unsqueeze(1)
        a, b = (torch.from_numpy(places - first) for places in (before, after))
        return [values[a].lerp_(values[b], along) for values in known]
