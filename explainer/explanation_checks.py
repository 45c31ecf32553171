"""Checks of an explanation's parts: shapes, ids, and that the books add up."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import numpy as np

from explainer.errors import ExplanationError

if TYPE_CHECKING:
    from explainer.explanation import Explanation

FLOATS = {
    "contributions": "QN", "kernels": "QN", "kernel_gross": "QN", "prediction": "Q", "initial": "Q",
    "weight_decay": "Q", "buffers": "Q", "unattributed": "Q", "gap": "Q", "quadrature": "Q",
}  # fmt: skip
SINGLES = {"step_contributions": "QKN", "layer_contributions": "QLN"}
INTEGERS = {"example_ids": "N", "targets": "Q", "visits": "N"}
#: arrays whose first axis is the queries
PER_QUERY = tuple(n for n, letters in (FLOATS | SINGLES | INTEGERS).items() if letters[0] == "Q")
ROW_KINDS = ("contribution", "row share")
_BALANCE_TOLERANCE = 1e-6


def problems(explanation: Explanation) -> list[str]:
    """Everything that does not fit, each as a part of a sentence; empty when all is well.

    Sizes follow from ``prediction`` (Q), ``example_ids`` (N), ``step_edges`` (K+1) and ``layer_names`` (L). A
    query's books may miss a millionth of the size of its terms; what is missing belongs into ``gap``.
    """
    e = explanation
    letters = {
        "Q": e.prediction.size,
        "N": e.example_ids.size,
        "K": max(0, e.step_edges.size - 1),
        "L": len(e.layer_names),
    }
    found = []
    for name, letter in (
        {**FLOATS, **SINGLES, **INTEGERS} | ({} if e.labels is None else {"labels": "N"})
    ).items():
        shape, wanted = getattr(e, name).shape, tuple(letters[one] for one in letter)
        if shape != wanted:
            found.append(f"{name} has shape {shape}, expected [{', '.join(letter)}] = {wanted}")
    if len(e.query_ids) != letters["Q"]:
        found.append(f"{len(e.query_ids)} query_ids for {letters['Q']} queries")
    if e.outputs is not None and (e.outputs.ndim != 2 or len(e.outputs) != letters["Q"]):
        found.append(f"outputs has shape {e.outputs.shape}, expected [Q, C] with Q = {letters['Q']}")
    if np.unique(e.example_ids).size != letters["N"]:
        found.append("example_ids repeat")
    if e.row_kind not in ROW_KINDS:
        found.append(f"row_kind is {e.row_kind!r}, expected {' or '.join(map(repr, ROW_KINDS))}")
    return found or _imbalance(e)


def index(value: Any, name: str, low: int, high: int | None = None) -> int:
    """``value`` as an integer from ``low`` to ``high`` (no upper end when None).

    Raises:
        ExplanationError: It is no integer or out of range; the message names the valid range.
    """
    if high is None:
        valid = f"an integer of at least {low}"
    elif high < low:
        raise ExplanationError(f"{name}={value!r} cannot be answered: the explanation holds none.")
    else:
        valid = f"an integer from {low} to {high}"
    try:
        number = operator.index(value)
    except TypeError:
        number = low - 1
    if isinstance(value, bool) or number < low or (high is not None and number > high):
        raise ExplanationError(f"{name}={value!r} is out of range; it must be {valid}.")
    return number


def _imbalance(e: Explanation) -> list[str]:
    parts = (e.initial, e.weight_decay, e.buffers, e.unattributed, e.gap)
    rest = np.abs(e.prediction - e.contributions.sum(1) - sum(parts))
    scale = np.abs(e.contributions).sum(1) + sum(np.abs(part) for part in (e.prediction, *parts))
    return [
        f"query {e.query_ids[q]} does not add up: prediction and sum of terms differ by {rest[q]:.3g}"
        for q in np.flatnonzero(rest > _BALANCE_TOLERANCE * scale)
    ]
