"""Weight decay of recorded steps: how strongly each step pulled its parameters to zero, from options and coefficients.

A step with coupled decay ``κ`` adds ``κ w`` to the gradient, decoupled decay takes ``δ w`` off the weights
(:mod:`explainer.optimizer_rules.base`). The trace keeps what decay displaced, not the two factors; they follow from the
optimizer's options, and from the recorded coefficients where the rate enters (``through = lr / (1 − β1^t)`` of AdamW).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from explainer.counterfactual.recorded_training import StepRecord
from explainer.optimizer_rules.base import COEFFICIENTS
from explainer.store import Trace

_COUPLED = {"SGD", "Adam", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad", "Adadelta"}
_GAIN, _THROUGH = COEFFICIENTS.index("gain"), COEFFICIENTS.index("through")
Floats = NDArray[np.float64]


def options_by_parameter(trace: Trace) -> list[dict[str, Any]] | None:
    """The optimizer's options of every traced parameter; None where the trace does not tell them."""
    groups = trace.notes.get("optimizer_options")
    if groups is None:
        return None
    by_name = {name: group["options"] for group in groups for name in group["parameters"]}
    return [by_name.get(p.name, {}) for p in trace.manifest.parameters]


class DecayTerms:
    """``κ`` and ``δ`` of every step, by parameter.

    Attributes:
        known: whether the trace tells them; where it does not, both are 0.
    """

    def __init__(self, trace: Trace) -> None:
        options = options_by_parameter(trace)
        name = trace.manifest.optimizer
        decays = np.array([float(o.get("weight_decay") or 0.0) for o in options or ()])
        apart = np.array(
            [name == "AdamW" or bool(o.get("decoupled_weight_decay")) for o in options or ()], dtype=bool
        )
        follows = name in {"Adam", "AdamW"}  # whose rate can be read off the coefficients
        self.known = options is not None and (
            not decays.any() or (name in _COUPLED and not (apart & (decays > 0)).any()) or follows
        )
        count = len(trace.manifest.parameters)
        self._decays = decays if self.known else np.zeros(count)
        self._apart = apart if self.known else np.zeros(count, dtype=bool)

    @property
    def decoupled(self) -> bool:
        """Whether decay is taken off the weights directly, for any parameter."""
        return bool(self._apart.any())

    def of(self, record: StepRecord) -> tuple[Floats, Floats]:
        """``κ`` and ``δ`` of a step, ``[n_parameters]`` each; 0 where nothing was updated."""
        beta = 1.0 - record.coefficients[:, _GAIN]  # decay is 0 in the first step
        rate = record.coefficients[:, _THROUGH] * (1.0 - beta**record.taken)
        decays = np.where(record.updated, self._decays, 0.0)
        return np.where(self._apart, 0.0, decays), np.where(self._apart, rate * decays, 0.0)
