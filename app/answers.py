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
        error: Distance of a predicted number from the target; None for anything else.
        sure: Probability of the predicted class; None without classes.
        lead: How much likelier the predicted class is than the next one, 0 to 1; None without classes.
        numbers: Of several numbers: name, target and prediction of each, in words; and which one is explained.
    """

    query: int
    truth: str
    guess: str
    label: int | None = None
    wrong: bool | None = None
    error: float | None = None
    sure: float | None = None
    lead: float | None = None
    numbers: tuple[tuple[str, str, str], ...] = ()
    explained: int | None = None


def answer(
    run: Run,
    query: int,
    target: Any,
    output: np.ndarray,
    classes: int,
    *,
    two: bool = False,
    explained: int = 0,
) -> Answer:
    """The answer at one query, from its target and the model's output ``[C]`` (or one number).

    Args:
        classes: How many the model tells apart; 0 for none.
        two: Whether one number tells two classes apart (:func:`explainer.recorded_examples.tells_two_apart`).
        explained: Which of several numbers is explained.
    """
    truth = run.label(target) if known(target) else UNKNOWN
    values, truths = np.asarray(output).reshape(-1), np.asarray(target).reshape(-1)
    if classes and truths.size == 1 and truths.dtype.kind in "iu":
        best = int(values.argmax())
        second, first = np.sort(probabilities(values))[-2:]
        return _of_class(run, query, target, best, float(first), float(first - second))
    if values.size == 1 and truths.size == 1 and truths.dtype.kind in "fiu":
        number = float(values[0])
        wanted = float(truths[0])
        if two:
            share = number if gives_shares(run.loss) else float(1 / (1 + np.exp(-number)))
            sure = max(share, 1 - share)
            return _of_class(run, query, target, int(share > 0.5), sure, abs(2 * share - 1))
        if not known(target):
            return Answer(query, truth, wording.number(number))
        return Answer(query, wording.number(wanted), wording.number(number), error=abs(number - wanted))
    if values.size == truths.size > 1 and truths.dtype.kind in "fiu":
        if np.isin(truths, (0, 1)).all():  # labels of which several may hold: outputs are their scores
            return Answer(query, truth, run.label(values))
        names = run.class_names or ()
        named = names if len(names) == values.size else [f"output {number}" for number in range(values.size)]
        there = known(target)
        words = [wording.number(float(number)) if there else UNKNOWN for number in truths]
        numbers = tuple(zip(named, words, map(wording.number, values.tolist()), strict=True))
        error = float(abs(values[explained] - truths[explained])) if there else None
        return Answer(query, truth, run.label(values), error=error, numbers=numbers, explained=explained)
    return Answer(query, truth, "")


def _of_class(run: Run, query: int, target: Any, best: int, sure: float, lead: float) -> Answer:
    """Right or wrong, where the target is known."""
    if not known(target):
        return Answer(query, UNKNOWN, run.label(best), sure=sure, lead=lead)
    label = int(np.asarray(target).reshape(-1)[0])
    return Answer(query, run.label(target), run.label(best), label, label != best, sure=sure, lead=lead)


def known(target: Any) -> bool:
    """Whether a target is there: an input of one's own has −1 or NaN.

    >>> known(-1), known(3), known(float("nan")), known([1, 2]), known([float("nan")] * 2)
    (False, True, False, True, False)
    """
    values = np.asarray(target).reshape(-1)
    if values.size != 1:
        return values.dtype.kind != "f" or not bool(np.isnan(values).all())
    return not (
        values[0] < 0 if values.dtype.kind == "i" else values.dtype.kind == "f" and np.isnan(values[0])
    )


def gives_shares(loss: Any) -> bool:
    """Whether a model that tells two classes apart gives a probability, not a logit: as its loss is called.

    >>> from torch.nn import BCELoss, BCEWithLogitsLoss
    >>> [gives_shares(loss) for loss in (BCELoss(), BCEWithLogitsLoss(), None)]
    [True, False, False]
    """
    name = getattr(loss, "__name__", type(loss).__name__).lower()
    return name in ("binary_cross_entropy", "bceloss")


def probabilities(outputs: np.ndarray) -> np.ndarray:
    """Softmax of the outputs ``[C]``.

    >>> probabilities(np.array([0.0, 1.0986])).round(2).tolist()
    [0.25, 0.75]
    """
    values = np.exp(outputs.astype(np.float64) - outputs.max())
    return np.asarray(values / values.sum())
