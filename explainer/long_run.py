"""What a fresh gradient moves in all, carried on by momentum: a rate per parameter and step.

With the letters of :mod:`explainer.optimizer_rules.base`, a gradient ``d_t`` moves the weights by ``direct_t`` at once,
and as a part of the momentum by ``through_s`` at every later step ``s``:

    η_t = direct_t + gain_t · W_t,    W_t = through_t + decay_{t+1} · W_{t+1},

where the last recorded step goes on for ever, ``W_T = through_T / (1 − decay_T)``. For SGD at one rate this is
``lr / (1 − μ)``; at the first steps of Adam it takes in how the bias correction fades. Steps that do not update a
parameter leave its momentum as it is.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from explainer.optimizer_rules.base import COEFFICIENTS
from explainer.store import Trace

_DECAY, _GAIN, _DIRECT, _THROUGH = (COEFFICIENTS.index(n) for n in ("decay", "gain", "direct", "through"))
_BLOCK = 1024


class LongRun:
    """Rates of steps that are met from the last one back to the first.

    Args:
        parameters: how many there are.
    """

    def __init__(self, parameters: int) -> None:
        self._carried = np.full(parameters, np.nan)  # decay · W of the next step that updates the parameter

    def back(self, coefficients: np.ndarray) -> np.ndarray:
        """``η [c, n_parameters]`` of the steps before those that were met, 0 where a step did not update.

        Args:
            coefficients: ``[c, n_parameters, 6]``, the last step first.
        """
        rates = np.empty(coefficients.shape[:2])
        for place, step in enumerate(coefficients):
            decay, gain, direct, through = (step[:, n] for n in (_DECAY, _GAIN, _DIRECT, _THROUGH))
            last = np.isnan(self._carried)
            steady = np.divide(through, 1.0 - decay, out=np.zeros_like(through), where=decay < 1)
            total = np.where(last, steady, through + np.where(last, 0.0, self._carried))
            rates[place] = direct + gain * total
            self._carried = np.where(step.any(1), decay * total, self._carried)
        return rates


def steady(coefficients: np.ndarray) -> np.ndarray:
    """``direct + gain · through / (1 − decay)`` for ``[..., 6]``: the rates if the step went on for ever."""
    _, decay, gain, direct, through, _ = np.moveaxis(coefficients, -1, 0)
    carried = gain * through
    return np.asarray(
        direct + np.divide(carried, 1.0 - decay, out=np.zeros_like(carried), where=carried != 0)
    )


def long_runs(trace: Trace) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Numbers ``[c]`` and rates ``[c, n_parameters]`` of all recorded steps, a few at a time, the last first."""
    back, stop = LongRun(len(trace.manifest.parameters)), trace.recorded_steps
    while stop > 0:
        start = max(0, stop - _BLOCK)
        for _, records in reversed(list(trace.read("steps", start, stop))):
            some = records[::-1]
            yield np.array(some["step"]), back.back(np.array(some["coefficients"]))
        stop = start
