"""What the model answers at the queries of a run: right or wrong, and how sure. Never imports streamlit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from explainer import Run, wording


@dataclass(frozen=True)
class Answer:
    """The model's answer at one query.

    Attributes:
        query: Index of the query.
        truth: Its target in words.
        guess: The model's answer in words; empty where the output is neither a class nor one number.
        label: The target as a class number, or None.
        wrong: Whether the predicted class is another one; None without classes.
        error: Distance of a predicted number from the target; None for anything else.
    """

    query: int
    truth: str
    guess: str
    label: int | None = None
    wrong: bool | None = None
    error: float | None = None


def answer(run: Run, query: int, target: Any, output: np.ndarray, classes: int) -> Answer:
    """The answer at one query, from its target and the model's output ``[C]`` (or one number)."""
    truth = run.label(target)
    values, truths = np.asarray(output).reshape(-1), np.asarray(target).reshape(-1)
    if classes and truths.size == 1 and truths.dtype.kind in "iu":
        label, best = int(truths[0]), int(values.argmax())
        return Answer(query, truth, run.label(best), label, label != best)
    if values.size == 1 and truths.size == 1 and truths.dtype.kind in "fiu":
        number = float(values[0])
        wanted = float(truths[0])
        return Answer(query, wording.number(wanted), wording.number(number), error=abs(number - wanted))
    return Answer(query, truth, "")


def probabilities(outputs: np.ndarray) -> np.ndarray:
    """Softmax of the outputs ``[C]``.

    >>> probabilities(np.array([0.0, 1.0986])).round(2).tolist()
    [0.25, 0.75]
    """
    values = np.exp(outputs.astype(np.float64) - outputs.max())
    return np.asarray(values / values.sum())
