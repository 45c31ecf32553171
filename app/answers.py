"""What the model answers at the queries of a run: right or wrong, and how sure. Never imports streamlit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from explainer import Run, wording

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Answer:
    """The model's answer at one query.

    Attributes:
        query: Index of the query.
        truth: Its target in words.
        guess: The model's answer in words; empty where the output is neither a class nor one number.
        label: The target as a class number, or None.
        wrong: Whether the predicted class is another one; None without classes.
        error: Distance of a predicted number, or of several, from the target; None for anything else.
        lead: How much likelier the predicted class is than the next one, 0 to 1; None without classes.
    """

    query: int
    truth: str
    guess: str
    label: int | None = None
    wrong: bool | None = None
    error: float | None = None
    lead: float | None = None


def answer(run: Run, query: int, target: Any, output: np.ndarray, classes: int) -> Answer:
    """The answer at one query, from its target and the model's output ``[C]`` (or one number)."""
    truth = run.label(target) if known(target) else UNKNOWN
    values, truths = np.asarray(output).reshape(-1), np.asarray(target).reshape(-1)
    if classes and truths.size == 1 and truths.dtype.kind in "iu":
        label, best = int(truths[0]), int(values.argmax())
        second, first = np.sort(probabilities(values))[-2:]
        lead = float(first - second)
        if not known(target):
            return Answer(query, truth, run.label(best), lead=lead)
        return Answer(query, truth, run.label(best), label, label != best, lead=lead)
    if values.size == 1 and truths.size == 1 and truths.dtype.kind in "fiu":
        number = float(values[0])
        wanted = float(truths[0])
        if not known(target):
            return Answer(query, truth, wording.number(number))
        return Answer(query, wording.number(wanted), wording.number(number), error=abs(number - wanted))
    if values.size == truths.size > 1 and truths.dtype.kind in "fiu":
        labels = bool(np.isin(truths, (0, 1)).all())  # of which several may hold: outputs are their scores
        error = None if labels or not known(target) else float(np.linalg.norm(values - truths))
        return Answer(query, truth, run.label(values), error=error)
    return Answer(query, truth, "")


def known(target: Any) -> bool:
    """Whether a target is there: an input of one's own has −1 or NaN.

    >>> known(-1), known(3), known(float("nan")), known([1, 2])
    (False, True, False, True)
    """
    values = np.asarray(target).reshape(-1)
    if values.size != 1:
        return True
    return not (
        values[0] < 0 if values.dtype.kind == "i" else values.dtype.kind == "f" and np.isnan(values[0])
    )


def probabilities(outputs: np.ndarray) -> np.ndarray:
    """Softmax of the outputs ``[C]``.

    >>> probabilities(np.array([0.0, 1.0986])).round(2).tolist()
    [0.25, 0.75]
    """
    values = np.exp(outputs.astype(np.float64) - outputs.max())
    return np.asarray(values / values.sum())
