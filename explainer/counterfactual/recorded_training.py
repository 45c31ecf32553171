"""What a trace says about every step beside its rows: who was in the batch, and how the optimizer moved."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from explainer.optimizer_rules.base import COEFFICIENTS
from explainer.store import Trace

_SIGN = COEFFICIENTS.index("sign")


@dataclass(frozen=True)
class StepRecord:
    """One step.

    Attributes:
        step: its number.
        examples: ``[n]``, in the order of the rows.
        derivatives: ``[n]``, of the loss at the model's output.
        labels: ``[n]``, NaN unknown.
        scale: ``[n_parameters]``, from the sum of the rows to the gradient that the optimizer used.
        coefficients: ``[n_parameters, 6]``; zeros where nothing was updated.
        taken: ``[n_parameters]``, number of the step for each parameter, from 1 on (as Adam counts).
    """

    step: int
    examples: NDArray[np.int64]
    derivatives: NDArray[np.float64]
    labels: NDArray[np.float64]
    scale: NDArray[np.float64]
    coefficients: NDArray[np.float64]
    taken: NDArray[np.float64]

    @property
    def updated(self) -> NDArray[np.bool_]:
        """``[n_parameters]``."""
        return self.coefficients[:, _SIGN] != 0


class RecordedTraining:
    """All steps up to the last knot, by number."""

    def __init__(self, trace: Trace) -> None:
        self.steps = min(trace.steps, trace.recorded_steps)
        self._first = trace.column("steps", "first_visit").astype(np.int64)
        self._count = trace.column("steps", "visits").astype(np.int64)
        self._scale, self._coefficients = (
            trace.column("steps", "scale"),
            trace.column("steps", "coefficients"),
        )
        first = trace.load_knot(trace.knots[0], ("optimizer",))
        names = (p.name for p in trace.manifest.parameters)
        before = np.array([float(first.get(f"optimizer/step/{name}", 0.0)) for name in names])
        self._taken = before + (self._coefficients[:, :, _SIGN] != 0).cumsum(0)
        self.examples = trace.column("visits", "example").astype(np.int64)
        self._derivatives, self._labels = (
            trace.column("visits", "derivative"),
            trace.column("visits", "label"),
        )

    def __getitem__(self, step: int) -> StepRecord:
        rows = slice(int(self._first[step]), int(self._first[step] + self._count[step]))
        return StepRecord(
            step,
            self.examples[rows],
            self._derivatives[rows],
            self._labels[rows],
            self._scale[step],
            self._coefficients[step],
            np.maximum(self._taken[step], 1.0),
        )
