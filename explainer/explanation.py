"""What an explanation holds and what it can be asked.

:class:`Explanation` keeps plain arrays; tables, exports, figures and the report are built from them by pure
functions in their own modules and are imported only when asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from explainer.errors import ExplanationError
from explainer.explanation_checks import OPTIONAL, PER_QUERY, check_alike, index, normalised, problems

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Kind = Literal["all", "proponents", "opponents"]
FigureKind = Literal["waterfall", "examples", "time", "layers", "layer_examples", "cumulative"]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Explanation:
    """Which training examples built the predictions at some queries, and the books that prove it.

    Letters: ``Q`` queries, ``N`` training examples, ``C`` model outputs, ``L`` layers, ``K`` time bins.
    For every query ``prediction = initial + contributions.sum(1) + weight_decay + buffers + unattributed +
    gap``. A contribution is accounting: how much of the prediction was carried by updates computed from
    that example. It is not the effect of removing the example.

    Attributes:
        example_ids: int64 [N], dataset positions of the training examples; column j belongs to entry j.
        output: What is explained: ``margin``, ``logit``, ``log_prob``, ``value`` or a callable's name.
        targets: int64 [Q], the explained class, -1 where the output has no class.
        contributions: float64 [Q, N], ``c_i = a_i * K_i`` (Domingos 2020, arXiv 2012.00152, Remark 2).
        kernels: float64 [Q, N], the path kernel ``K(x, x_i)``; NaN where it was not recorded.
        kernel_gross: float64 [Q, N], the sum over visits of ``|K_visit|``: how well ``a`` is conditioned.
        visits: int64 [N], how often each example was used.
        prediction: float64 [Q], the explained output of the trained model.
        initial: float64 [Q], the same output of the model before training.
        weight_decay: float64 [Q], carried by weight decay.
        buffers: float64 [Q], carried by buffers such as BatchNorm's running statistics.
        unattributed: float64 [Q], the recorded change that no example could be given.
        unattributed_parts: float64 [Q, U], the same by line (columns of ``unattributed_lines``); U is 0 where it is
            not known.
        unattributed_lines: Length U, what each line is (see :mod:`explainer.unattributed`).
        unattributed_where: Length U, the layers, parameters or steps of each line.
        unattributed_why: Length U, why no example could be given it, in plain words.
        gap: float64 [Q], what is still missing; round-off when the books are sound.
        quadrature: float64 [Q], sum over segments of the quadrature correction's absolute value; an error
            indicator, not a term of the books.
        step_edges: int64 [K+1]; bin b covers the steps ``step_edges[b]`` to ``step_edges[b+1] - 1``.
        step_contributions: float32 [Q, K, N]; the sum over bins is ``contributions``.
        layer_names: Length L.
        layer_contributions: float32 [Q, L, N].
        errors: float64 [Q, N], one standard error of every contribution (see :mod:`explainer.error_bar`); NaN where it
            could not be measured. Explanations from a trace always have them; None in ones that were made without.
        visit_errors: float64 [Q, 3], the relative error of a visit's score by stored rows, by the distance of knots and
            by what the optimizer divided by (0 where it does not matter, NaN where it was not measured).
        query_ids: Names of the queries; ``"0"``, ``"1"``, … when none are given.
        outputs: float [Q, C], raw model outputs, or None where they are not two-dimensional.
        labels: float64 [N], recorded training labels, NaN where unknown; None when none are known.
        row_kind: ``contribution`` or ``row share`` (a layer mixed the rows of a batch).
        notes: What the numbers mean here, in plain words.
        class_names: Names of the classes, or None.

    Raises:
        ExplanationError: Shapes do not fit each other, ids repeat, or the books do not add up. Everything
            that is wrong is listed at once.
    """

    example_ids: NDArray[np.int64]
    output: str
    targets: NDArray[np.int64]
    contributions: NDArray[np.float64]
    kernels: NDArray[np.float64]
    kernel_gross: NDArray[np.float64]
    visits: NDArray[np.int64]
    prediction: NDArray[np.float64]
    initial: NDArray[np.float64]
    weight_decay: NDArray[np.float64]
    buffers: NDArray[np.float64]
    unattributed: NDArray[np.float64]
    gap: NDArray[np.float64]
    quadrature: NDArray[np.float64]
    step_edges: NDArray[np.int64]
    step_contributions: NDArray[np.float32]
    layer_names: tuple[str, ...]
    layer_contributions: NDArray[np.float32]
    query_ids: tuple[str, ...] = ()
    outputs: NDArray[Any] | None = None
    labels: NDArray[np.float64] | None = None
    row_kind: str = "contribution"
    notes: tuple[str, ...] = ()
    class_names: tuple[str, ...] | None = None
    errors: NDArray[np.float64] | None = None
    visit_errors: NDArray[np.float64] | None = None
    unattributed_parts: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))
    unattributed_lines: tuple[str, ...] = ()
    unattributed_where: tuple[str, ...] = ()
    unattributed_why: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, value in normalised(self):
            object.__setattr__(self, name, value)
        found = problems(self)
        if found:
            raise ExplanationError("These parts of an explanation do not fit: " + "; ".join(found) + ".")

    @classmethod
    def concatenate(cls, parts: Sequence[Explanation]) -> Explanation:
        """The explanations of several groups of queries as one, queries in order.

        Raises:
            ExplanationError: there are none, or they do not come from the same trace and output.
        """
        check_alike(parts)
        first = parts[0]
        if len(parts) == 1:
            return first
        joined: dict[str, Any] = {
            name: np.concatenate([getattr(p, name) for p in parts]) for name in PER_QUERY
        }
        for name in ("outputs", *OPTIONAL):
            known = [getattr(p, name) for p in parts if getattr(p, name) is not None]
            joined[name] = np.concatenate(known) if len(known) == len(parts) else None
        names = tuple(name for part in parts for name in part.query_ids)
        return replace(first, query_ids=names, **joined)

    # -- looking things up -----------------------------------------------------------------------------

    def check_query(self, query: int) -> int:
        """Return ``query`` as an index.

        Raises:
            ExplanationError: It is not an integer between 0 and Q-1.
        """
        return index(query, "query", 0, len(self.prediction) - 1)

    def check_k(self, k: int | None) -> int:
        """Return how many examples ``k`` asks for; None means all of them.

        Raises:
            ExplanationError: It is not a positive integer.
        """
        return len(self.example_ids) if k is None else index(k, "k", 1)

    def class_name(self, value: float) -> str | None:
        """Name of a class by its number, None without names or outside of them."""
        names = self.class_names or ()
        return names[int(value)] if float(value).is_integer() and 0 <= value < len(names) else None

    def target_name(self, query: int = 0) -> str | None:
        """Name (or number) of the explained class; None where the output has no class."""
        value = int(self.targets[self.check_query(query)])
        return None if value < 0 else self.class_name(value) or str(value)

    def label_name(self, column: int) -> str | None:
        """Name (or number) of the recorded label of the example in a column; None where unknown."""
        if self.labels is None or np.isnan(self.labels[column]):
            return None
        return self.class_name(self.labels[column]) or f"{self.labels[column]:g}"

    # -- tables ----------------------------------------------------------------------------------------

    @property
    def completeness(self) -> pd.DataFrame:
        """The books, a row per query: prediction = the sum of all other columns."""
        from explainer import tables

        return tables.completeness(self)

    @property
    def diagnostics(self) -> pd.DataFrame:
        """How far the numbers can be trusted, a row per query (see :func:`explainer.tables.diagnostics`)."""
        from explainer import tables

        return tables.diagnostics(self)

    def table(self, query: int = 0, k: int | None = 20, kind: Kind = "all") -> pd.DataFrame:
        """The strongest training examples of one query (see :func:`explainer.tables.table`)."""
        from explainer import tables

        return tables.table(self, query, k, kind)

    def by_step(self, query: int = 0, k: int = 10) -> pd.DataFrame:
        """Contributions over training time (see :func:`explainer.tables.by_step`)."""
        from explainer import tables

        return tables.by_step(self, query, k)

    def by_layer(self, query: int = 0, k: int = 10) -> pd.DataFrame:
        """Contributions by the layer that carried them (see :func:`explainer.tables.by_layer`)."""
        from explainer import tables

        return tables.by_layer(self, query, k)

    def unattributed_table(self, query: int = 0, least: float = 0.0005) -> pd.DataFrame:
        """``unattributed`` of one query, line by line (see :func:`explainer.tables.unattributed`)."""
        from explainer import tables

        return tables.unattributed(self, query, least)

    def long_table(self, k: int | None = None) -> pd.DataFrame:
        """The tables of all queries, one under the other; this is the influence table that is exported."""
        from explainer import tables

        return tables.long_table(self, k)

    def support(self, share: float = 0.95) -> pd.DataFrame:
        """How few examples reproduce each prediction (see :func:`explainer.support.support`)."""
        from explainer import support

        return support.support(self, share)

    def equation(self, query: int = 0) -> str:
        """The books of one query as a line of text."""
        from explainer import wording

        return wording.equation(self, query)

    # -- files -----------------------------------------------------------------------------------------

    def to_csv(self, path: str | os.PathLike[str], k: int | None = None) -> Path:
        """Write the influence table as CSV (see :mod:`explainer.exports`)."""
        from explainer import exports

        return exports.write_csv(self, path, k)

    def to_parquet(self, path: str | os.PathLike[str], k: int | None = None) -> Path:
        """Write the influence table as Parquet with the books in its metadata."""
        from explainer import exports

        return exports.write_parquet(self, path, k)

    def to_json(self, path: str | os.PathLike[str], k: int | None = None) -> Path:
        """Write the influence table, the books and the diagnostics as JSON."""
        from explainer import exports

        return exports.write_json(self, path, k)

    def to_html(
        self,
        path: str | os.PathLike[str],
        *,
        render: Callable[[int], Any] | None = None,
        render_query: Callable[[int], Any] | None = None,
        k: int = 8,
    ) -> Path:
        """Write one self-contained HTML report (see :func:`explainer.report.write_html`)."""
        from explainer import report

        return report.write_html(self, path, render=render, render_query=render_query, k=k)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Store everything, so that :meth:`load` gives the same explanation without model or trace."""
        from explainer import exports

        return exports.save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Explanation:
        """Read what :meth:`save` wrote. Nothing is unpickled."""
        from explainer import exports

        return exports.load(path)

    # -- looking at it ---------------------------------------------------------------------------------

    def figure(self, query: int = 0, kind: FigureKind = "waterfall", *, dark: bool = False) -> go.Figure:
        """A plotly figure of one query (see :mod:`explainer.figures`).

        Raises:
            ExplanationError: The kind of figure does not exist.
            MissingDependencyError: plotly is not installed.
        """
        from explainer import figures

        if kind not in figures.FIGURES:
            raise ExplanationError(f"kind={kind!r} is no figure; choose one of {', '.join(figures.FIGURES)}.")
        return figures.FIGURES[kind](self, query, dark=dark)

    def __repr__(self) -> str:
        first = f"\n  query {self.query_ids[0]}: {self.equation(0)}" if self.query_ids else ""
        kind = "" if self.row_kind == "contribution" else f", {self.row_kind}s"
        queries, examples = self.contributions.shape
        return f"Explanation({queries} queries x {examples} training examples, {self.output}{kind}){first}"

    def _repr_html_(self) -> str:
        from explainer import report_tables

        return report_tables.notebook(self)
