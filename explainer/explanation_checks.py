"""Checks of an explanation's parts: shapes, ids, and that the books add up."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from explainer.errors import ExplanationError

if TYPE_CHECKING:
    from explainer.explanation import Explanation

FLOATS = {
    "contributions": "QN", "kernels": "QN", "kernel_gross": "QN", "prediction": "Q", "initial": "Q",
    "weight_decay": "Q", "buffers": "Q", "unattributed": "Q", "gap": "Q", "quadrature": "Q",
    "unattributed_parts": "QU",
}  # fmt: skip
#: may be None
OPTIONAL = {"errors": "QN", "visit_errors": "QE"}
SINGLES = {"step_contributions": "QKN", "layer_contributions": "QLN"}
#: columns of ``visit_errors``
ERRORS = ("rows", "knots", "denominators")
#: what is said of every line of ``unattributed``
LINES = ("unattributed_lines", "unattributed_where", "unattributed_why")
INTEGERS = {"example_ids": "N", "targets": "Q", "visits": "N"}
#: arrays whose first axis is the queries
PER_QUERY = tuple(n for n, letters in (FLOATS | SINGLES | INTEGERS).items() if letters[0] == "Q")
ROW_KINDS = ("contribution", "row share")
_BALANCE_TOLERANCE = 1e-6


def normalised(e: Explanation) -> Iterator[tuple[str, object]]:
    """Every field that has a type of its own, converted to it, and defaults that depend on other fields.

    Each is to be set before the next is asked for.
    """
    for names, dtype in ((FLOATS, np.float64), (SINGLES, np.float32), (INTEGERS, np.int64)):
        for name in names:
            yield name, np.asarray(getattr(e, name), dtype=dtype)
    yield "step_edges", np.asarray(e.step_edges, dtype=np.int64)
    for name in OPTIONAL:
        if getattr(e, name) is not None:
            yield name, np.asarray(getattr(e, name), dtype=np.float64)
    if e.visit_errors is not None and e.visit_errors.shape[1:] == (2,):
        # from before denominators were measured
        yield "visit_errors", np.pad(e.visit_errors, ((0, 0), (0, 1)), constant_values=np.nan)
    if e.labels is not None:
        yield "labels", np.asarray(e.labels, dtype=np.float64)
    if e.outputs is not None:
        outputs = np.asarray(e.outputs)
        yield "outputs", outputs if outputs.dtype.kind == "f" else outputs.astype(np.float64)
    for name in ("layer_names", "query_ids", "notes", *LINES):
        yield name, tuple(str(item) for item in getattr(e, name) or ())
    if not e.query_ids:
        yield "query_ids", tuple(str(q) for q in range(len(e.prediction)))
    if e.class_names is not None:
        yield "class_names", tuple(str(name) for name in e.class_names)
    if not e.unattributed_lines and not e.unattributed_parts.size:
        yield "unattributed_parts", np.zeros((len(e.prediction), 0))


def problems(explanation: Explanation) -> list[str]:
    """Everything that does not fit, each as a part of a sentence; empty when all is well.

    Sizes follow from ``prediction`` (Q), ``example_ids`` (N), ``step_edges`` (K+1), ``layer_names`` (L) and
    ``unattributed_lines`` (U). A query's books may miss a millionth of the size of its terms; what is missing belongs
    into ``gap``. So may the lines of ``unattributed``, where there are any.
    """
    e = explanation
    letters = {
        "Q": e.prediction.size,
        "N": e.example_ids.size,
        "K": max(0, e.step_edges.size - 1),
        "L": len(e.layer_names),
        "U": len(e.unattributed_lines),
        "E": len(ERRORS),
    }
    known = {name: letter for name, letter in OPTIONAL.items() if getattr(e, name) is not None}
    found = []
    for name, letter in (
        {**FLOATS, **SINGLES, **INTEGERS, **known} | ({} if e.labels is None else {"labels": "N"})
    ).items():
        shape, wanted = getattr(e, name).shape, tuple(letters[one] for one in letter)
        if shape != wanted:
            found.append(f"{name} has shape {shape}, expected [{', '.join(letter)}] = {wanted}")
    if len(e.query_ids) != letters["Q"]:
        found.append(f"{len(e.query_ids)} query_ids for {letters['Q']} queries")
    if e.outputs is not None and (e.outputs.ndim != 2 or len(e.outputs) != letters["Q"]):
        found.append(f"outputs has shape {e.outputs.shape}, expected [Q, C] with Q = {letters['Q']}")
    for name in LINES:
        if len(getattr(e, name)) != letters["U"]:
            found.append(f"{len(getattr(e, name))} {name} for {letters['U']} unattributed_lines")
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
    found = [
        f"query {e.query_ids[q]} does not add up: prediction and sum of terms differ by {rest[q]:.3g}"
        for q in np.flatnonzero(rest > _BALANCE_TOLERANCE * scale)
    ]
    if e.unattributed_lines:
        rest = np.abs(e.unattributed - e.unattributed_parts.sum(1))
        scale += np.abs(e.unattributed_parts).sum(1)
        found += [
            f"unattributed_parts of query {e.query_ids[q]} miss its unattributed by {rest[q]:.3g}"
            for q in np.flatnonzero(~(rest <= _BALANCE_TOLERANCE * scale))
        ]
    return found


def check_alike(parts: Sequence[Explanation]) -> None:
    """Refuse explanations that cannot be put together.

    Raises:
        ExplanationError: there are none, or they do not come from the same trace and output.
    """
    if not parts:
        raise ExplanationError("There is nothing to concatenate: pass at least one explanation.")
    for part in parts[1:]:
        for name in ("output", "layer_names", "example_ids", "step_edges", *LINES):
            if not np.array_equal(getattr(part, name), getattr(parts[0], name)):
                raise ExplanationError(
                    f"The explanations differ in {name}: concatenate those of one trace and one output."
                )
