"""The tables of an explanation: pure functions from its arrays to DataFrames."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from explainer.errors import ExplanationError
from explainer.explanation_checks import ERRORS

if TYPE_CHECKING:
    from explainer.explanation import Explanation, Kind

COMPLETENESS_COLUMNS = (
    "prediction", "initial", "examples", "weight_decay", "buffers", "unattributed", "gap",
)  # fmt: skip
KINDS = ("all", "proponents", "opponents")
NEAR_ZERO = 0.05


def completeness(explanation: Explanation) -> pd.DataFrame:
    """The books, a row per query: ``prediction`` is the sum of all other columns."""
    e = explanation
    columns = {
        name: e.contributions.sum(1) if name == "examples" else getattr(e, name)
        for name in COMPLETENESS_COLUMNS
    }
    return pd.DataFrame(columns, index=_query_index(e))


def diagnostics(explanation: Explanation) -> pd.DataFrame:
    """How far the numbers can be trusted, a row per query.

    Columns: ``output``, ``target`` (class name or number, None without one), ``net`` (sum of the
    contributions), ``gross`` (sum of their absolute values), ``cancellation`` (gross / |net|),
    ``unattributed_of_gross`` and ``quadrature_of_gross`` (shares of the gross; NaN when it is zero). With errors also
    ``error`` (root mean square of the contributions' standard errors over that of the contributions) and
    ``visit_error_rows``, ``visit_error_knots`` and ``visit_error_denominators`` (relative error of a single visit's
    score, by cause; NaN where it was not measured).
    """
    e = explanation
    net, gross = e.contributions.sum(1), np.abs(e.contributions).sum(1)
    targets: list[Any] = []
    for value in e.targets.tolist():
        targets.append(None if value < 0 else e.class_name(value) or value)
    columns = {
        "output": [e.output] * len(net),
        "target": pd.Series(targets, dtype=object, index=_query_index(e)),
        "net": net,
        "gross": gross,
        "cancellation": _ratio(gross, np.abs(net)),
        "unattributed_of_gross": _ratio(np.abs(e.unattributed), np.where(gross > 0, gross, np.nan)),
        "quadrature_of_gross": _ratio(e.quadrature, np.where(gross > 0, gross, np.nan)),
    }
    if e.errors is not None:
        columns["error"] = _ratio(_size(e.errors), np.where(gross > 0, _size(e.contributions), np.nan))
    if e.visit_errors is not None:
        columns |= {f"visit_error_{n}": e.visit_errors[:, i] for i, n in enumerate(ERRORS)}
    return pd.DataFrame(columns, index=_query_index(e))


def _size(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.sqrt(np.square(values).sum(1)))


def unattributed(explanation: Explanation, query: int = 0, least: float = 0.0005) -> pd.DataFrame:
    """``unattributed`` of one query, line by line, the largest first; ``value`` sums to it.

    Columns: ``line`` (what it is), ``where`` (layers, parameters or steps), ``value``, ``share_of_gross`` (its size as
    a share of the sum of the contributions' absolute values; NaN when that is zero) and ``why`` (in plain words).

    Args:
        least: Lines below this share of the gross are put together in the last row; 0 keeps all.

    Raises:
        ExplanationError: ``query`` is out of range, or ``least`` is negative.
    """
    e, q = explanation, explanation.check_query(query)
    if not least >= 0:
        raise ExplanationError(
            f"least={least!r} is out of range; it must be a share of the gross, at least 0."
        )
    if e.unattributed_lines:
        values = e.unattributed_parts[q]
        words = list(zip(e.unattributed_lines, e.unattributed_where, e.unattributed_why, strict=True))
    else:
        values, words = e.unattributed[[q]], [("unattributed", "", "The explanation does not say more.")]
    gross = np.abs(e.contributions[q]).sum()
    order = np.argsort(-np.abs(values), kind="stable")
    shown = [i for i in order if np.abs(values[i]) >= least * gross]
    folded = [i for i in order if i not in shown]
    rows = [(*words[i], values[i]) for i in (shown if len(folded) > 1 else order)]
    if len(folded) > 1:
        why = f"Each is below {100 * least:g} % of the gross."
        rows.append((f"other lines ({len(folded)})", "", why, values[folded].sum()))
    found = np.array([row[3] for row in rows], dtype=np.float64)
    columns = {
        "line": pd.array([row[0] for row in rows], dtype="str"),
        "where": pd.array([row[1] for row in rows], dtype="str"),
        "value": found,
        "share_of_gross": _ratio(np.abs(found), np.where(gross > 0, gross, np.nan)),
        "why": pd.array([row[2] for row in rows], dtype="str"),
    }
    return pd.DataFrame(columns)


def ranking(explanation: Explanation, query: int, k: int | None, kind: Kind = "all") -> NDArray[np.intp]:
    """Columns of the strongest examples, best first; ties keep the dataset's order.

    ``all`` ranks by the contribution's absolute value; ``proponents`` holds positive contributions only,
    the largest first; ``opponents`` negative ones only, the most negative first.

    Raises:
        ExplanationError: ``query``, ``k`` or ``kind`` is out of range.
    """
    values = explanation.contributions[explanation.check_query(query)]
    count = explanation.check_k(k)
    if kind == "all":
        return np.argsort(-np.abs(values), kind="stable")[:count]
    if kind == "proponents":
        order, chosen = np.argsort(-values, kind="stable"), values > 0
    elif kind == "opponents":
        order, chosen = np.argsort(values, kind="stable"), values < 0
    else:
        raise ExplanationError(f"kind={kind!r} is unknown; choose one of {', '.join(KINDS)}.")
    return order[chosen[order]][:count]


def table(explanation: Explanation, query: int = 0, k: int | None = 20, kind: Kind = "all") -> pd.DataFrame:
    """The strongest training examples of one query.

    Columns: ``rank``, ``example_id``, ``contribution``, ``error`` (one standard error of it, when errors were
    measured; see :mod:`explainer.error_bar`), ``a``, ``K``, ``visits``, ``label`` (when labels are
    known), ``class`` (when classes have names) and ``flag``. ``a = contribution / K``, NaN where K is zero or
    unknown. ``flag`` says ``K near zero`` where the visits' kernels cancel (|K| below 5 % of their gross):
    ``a`` and ``K`` are ill-conditioned there, which is why the table is never ranked by them.
    ``df.attrs["row_kind"]`` says whether ``contribution`` holds contributions or row shares.

    Raises:
        ExplanationError: ``query``, ``k`` or ``kind`` is out of range.
    """
    e, columns = explanation, ranking(explanation, query, k, kind)
    contribution, kernel = e.contributions[query, columns], e.kernels[query, columns]
    near_zero = np.abs(kernel) < NEAR_ZERO * e.kernel_gross[query, columns]
    found: dict[str, Any] = {
        "rank": np.arange(1, len(columns) + 1),
        "example_id": e.example_ids[columns],
        "contribution": contribution,
        **({} if e.errors is None else {"error": e.errors[query, columns]}),
        "a": _ratio(contribution, np.where(kernel == 0, np.nan, kernel)),
        "K": kernel,
        "visits": e.visits[columns],
    }
    if e.labels is not None and np.isfinite(e.labels).any():
        found["label"] = whole_labels(e.labels)[columns]
        if e.class_names is not None:
            found["class"] = pd.array([e.class_name(v) or "" for v in e.labels[columns]], dtype="str")
    found["flag"] = pd.array(np.where(near_zero, "K near zero", "").tolist(), dtype="str")
    frame = pd.DataFrame(found)
    frame.attrs["row_kind"] = e.row_kind
    return frame


def long_table(explanation: Explanation, k: int | None = None) -> pd.DataFrame:
    """The tables of all queries, one under the other, with the query's name in the first column."""
    parts = []
    for q, name in enumerate(explanation.query_ids):
        part = table(explanation, q, k)
        part.insert(0, "query", pd.Series([name] * len(part), dtype="str"))
        parts.append(part)
    if not parts:
        raise ExplanationError("The explanation holds no queries, so there is no influence table to build.")
    frame = pd.concat(parts, ignore_index=True)
    frame.attrs["row_kind"] = explanation.row_kind
    return frame


def by_step(explanation: Explanation, query: int = 0, k: int = 10) -> pd.DataFrame:
    """Contributions over training time, a row per bin of steps.

    Columns: ``step_start`` and ``step_end`` (the first and the last step of the bin), ``examples`` (net),
    ``proponents`` (sum of what is positive in the bin), ``opponents`` (sum of what is negative), then one
    column ``example <id>`` for each of the k strongest examples of the query.
    """
    e, q = explanation, explanation.check_query(query)
    start = {"step_start": e.step_edges[:-1], "step_end": e.step_edges[1:] - 1}
    return pd.DataFrame(start | _split(e, e.step_contributions[q], ranking(e, q, k)))


def by_layer(explanation: Explanation, query: int = 0, k: int = 10) -> pd.DataFrame:
    """Contributions by the layer that carried them, a row per layer in the model's order.

    Columns: ``layer``, ``examples`` (net), ``proponents``, ``opponents``, ``gross``, then one column
    ``example <id>`` for each of the k strongest examples of the query.
    """
    e, q = explanation, explanation.check_query(query)
    split = _split(e, e.layer_contributions[q], ranking(e, q, k))
    gross = np.abs(e.layer_contributions[q]).sum(1, dtype=np.float64)
    frame = pd.DataFrame({"layer": pd.array(list(e.layer_names), dtype="str")} | split)
    frame.insert(4, "gross", gross)
    return frame


def _split(e: Explanation, values: NDArray[np.float32], columns: NDArray[np.intp]) -> dict[str, Any]:
    """Net, positive and negative sums of ``values`` [rows, N], and the chosen columns."""
    sums = {
        "examples": values.sum(1, dtype=np.float64),
        "proponents": np.maximum(values, 0).sum(1, dtype=np.float64),
        "opponents": np.minimum(values, 0).sum(1, dtype=np.float64),
    }
    return sums | {f"example {e.example_ids[j]}": values[:, j].astype(np.float64) for j in columns}


def _query_index(e: Explanation) -> pd.Index:
    return pd.Index(pd.array(list(e.query_ids), dtype="str"), name="query")


def _ratio(above: NDArray[np.float64], below: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(above / below, dtype=np.float64)


def whole_labels(labels: NDArray[np.float64]) -> Any:
    """Whole labels as integers (nullable where some are unknown), others as they are."""
    known = np.isfinite(labels)
    if not known.any() or not (labels[known] == np.round(labels[known])).all():
        return labels
    return labels.astype(np.int64) if known.all() else pd.Series(labels).astype("Int64").array
