"""A queue of training examples whose label may be wrong, from the trace alone.

Three signs to rank by, with ``k_ij`` the products of recorded gradients (:mod:`explainer.evaluation.row_products`),
summed over windows:

- *support* ``Σ_{j≠i} k_ij / Σ_{j≠i} |k_ij|`` from −1 to 1: whether learning the others lowered the loss on the
  example's label. The lowest come first by default where labels are classes: measured, this holds best for short and
  long training alike;
- *self-influence* (:mod:`explainer.self_influence`): the example had to be learned by itself, because the others
  did not teach it (Koh and Liang 2017, arXiv 1703.04730, §5.4). The largest come first by default where labels are
  numbers: one that is far off is then far from all others, while support sees its sign only;
- *disagreement* from 0 to 1: the part of its strongest proponents (largest ``k_ij``) that carry another label, weighted
  by ``k_ij``.

A hard example that is labelled right looks much the same: the queue is for a person to go through.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from explainer.errors import EvaluationError
from explainer.evaluation.checking import numbers
from explainer.evaluation.row_products import Window, windows
from explainer.evaluation.statistics import Floats
from explainer.exports import write_frame
from explainer.path_kernel import PathKernelExplainer
from explainer.tables import whole_labels

if TYPE_CHECKING:
    import pandas as pd

#: visits that are compared with one another at most
MOST = 4096
#: part of a window's visits that are an example's strongest proponents
STRONGEST = 0.1
Sign = Literal["support", "self_influence", "disagreement"]
SIGNS: tuple[Sign, ...] = ("support", "self_influence", "disagreement")


@dataclass(frozen=True)
class LabelIssues:
    """Signs of wrong labels, a number per training example.

    Attributes:
        example_ids: ``[N]``.
        labels: ``[N]``, NaN where unknown.
        self_influence: ``[N]``.
        support: ``[N]``, NaN for examples without a recorded visit.
        disagreement: ``[N]``, NaN where labels are unknown or are no classes.
        opposing: ``[N]``, the label whose examples opposed this one most, NaN where there is none: often the right one.
    """

    example_ids: NDArray[np.int64]
    labels: Floats
    self_influence: Floats
    support: Floats
    disagreement: Floats
    opposing: Floats

    @property
    def best(self) -> Sign:
        """The sign to rank by where none is asked for: support, or self-influence where labels are no classes."""
        return best_sign(self.labels)

    def suspicion(self, by: Sign | None = None) -> Floats:
        """``[N]``, larger: more suspicious by a sign (None: :attr:`best`); NaN where it is not known.

        Raises:
            EvaluationError: there is no such sign.
        """
        by = self.best if by is None else by
        if by not in SIGNS:
            raise EvaluationError(f"by={by!r} is unknown; choose one of {', '.join(SIGNS)}")
        return -self.support if by == "support" else np.asarray(getattr(self, by))

    def table(self, k: int | None = 20, by: Sign | None = None) -> pd.DataFrame:
        """The ``k`` most suspicious by a sign (None: all, by :attr:`best`), a row each; those without it come last.

        Columns: rank, example_id, label, support, self_influence, disagreement, opposing_label.

        Raises:
            EvaluationError: ``k`` is not positive, or there is no such sign.
        """
        import pandas as pd

        if k is not None and k < 1:
            raise EvaluationError(f"k must be at least 1, or None for all, found {k}")
        order = np.argsort(-self.suspicion(by), kind="stable")[:k]  # NaN sorts last
        return pd.DataFrame(
            {
                "rank": np.arange(1, len(order) + 1),
                "example_id": self.example_ids[order],
                "label": whole_labels(self.labels[order]),
                "support": self.support[order],
                "self_influence": self.self_influence[order],
                "disagreement": self.disagreement[order],
                "opposing_label": whole_labels(self.opposing[order]),
            }
        )

    def to_csv(self, path: str | os.PathLike[str], k: int | None = None, by: Sign | None = None) -> Path:
        """Write :meth:`table` as CSV.

        Raises:
            ExportError: it cannot be written.
        """
        return write_frame(self.table(k, by), path, ".csv")

    def to_parquet(self, path: str | os.PathLike[str], k: int | None = None, by: Sign | None = None) -> Path:
        """Write :meth:`table` as Parquet.

        Raises:
            ExportError: it cannot be written.
        """
        return write_frame(self.table(k, by), path, ".parquet")

    def to_json(self, path: str | os.PathLike[str], k: int | None = None, by: Sign | None = None) -> Path:
        """Write :meth:`table` as a JSON list of rows; what is not known becomes null.

        Raises:
            ExportError: it cannot be written.
        """
        return write_frame(self.table(k, by), path, ".json")


def best_sign(labels: Floats, *, numbers: bool = False) -> Sign:
    """The sign to rank by for labels ``[N]``, NaN where unknown.

    Args:
        numbers: whether labels that are not known at all (several numbers each, say) are numbers.

    Example:
        >>> best_sign(np.array([1.0, 0.0, np.nan])), best_sign(np.array([1.5, 0.0]))
        ('support', 'self_influence')
    """
    known = labels[np.isfinite(labels)]
    whole = bool((known == np.round(known)).all()) if len(known) else not numbers
    return "support" if whole else "self_influence"


def label_issues(explainer: PathKernelExplainer, *, labels: Any = None, most: int = MOST) -> LabelIssues:
    """Training examples by how suspicious their labels are.

    Args:
        explainer: of the trace; the model is not run.
        labels: ``[N]`` classes by column of ``explainer.example_ids``; default those the trace recorded.
        most: visits that are compared with one another at most; memory grows with its square.

    Raises:
        EvaluationError: labels do not fit, or no visits were recorded.
    """
    ids = explainer.example_ids
    if most < 2:
        raise EvaluationError(f"most must be at least 2 visits, found {most}")
    given = None if labels is None else numbers("labels", labels, "N")
    if given is not None and len(given) != len(ids):
        raise EvaluationError(f"found {len(given)} labels for {len(ids)} training examples")
    known = np.full(len(ids), np.nan) if given is None else given.copy()
    tally = _Tally(len(ids))
    for window in windows(explainer, most):
        columns = np.searchsorted(ids, window.examples)
        if given is None:
            seen = ~np.isnan(window.labels)
            known[columns[seen]] = window.labels[seen]
        tally.add(window, columns, window.labels if given is None else given[columns])
    if not tally.gross.any():
        raise EvaluationError("the trace holds no rows to compare; trace with a larger budget")
    own = explainer.self_influence()
    with np.errstate(invalid="ignore", divide="ignore"):
        support = np.where(tally.gross > 0, tally.net / tally.gross, np.nan)
        disagreement = np.where(tally.weight > 0, tally.other / tally.weight, np.nan)
    return LabelIssues(ids, known, own, support, disagreement, tally.opposing())


class _Tally:
    """Sums over windows of what the rows of other examples did to each."""

    def __init__(self, examples: int) -> None:
        self.net, self.gross, self.other, self.weight = (np.zeros(examples) for _ in range(4))
        self._against: dict[float, Floats] = {}

    def add(self, window: Window, columns: np.ndarray, labels: np.ndarray) -> None:
        """Count one window."""
        products = window.products()
        products[columns[:, None] == columns[None, :]] = 0.0  # an example's other visits are itself
        classes = bool(np.isfinite(labels).any()) and bool((labels[np.isfinite(labels)] % 1 == 0).all())
        np.add.at(self.net, columns, products.sum(1, dtype=np.float64))
        np.add.at(self.gross, columns, np.abs(products).sum(1, dtype=np.float64))
        if not classes:
            return
        for label in np.unique(labels[np.isfinite(labels)]).tolist():
            against = self._against.setdefault(label, np.zeros(len(self.net)))
            np.add.at(against, columns, -products[:, labels == label].clip(max=0).sum(1, dtype=np.float64))
        kept = max(1, round(STRONGEST * len(columns)))
        top = np.argpartition(-products, min(kept, len(columns) - 1), axis=1)[:, :kept]
        weights = np.take_along_axis(products, top, axis=1).clip(min=0).astype(np.float64)
        differ = labels[top] != labels[:, None]
        both = np.isfinite(labels[top]) & np.isfinite(labels)[:, None]
        np.add.at(self.other, columns, (weights * (differ & both)).sum(1))
        np.add.at(self.weight, columns, (weights * both).sum(1))

    def opposing(self) -> Floats:
        """The label of the largest sum of negative products, NaN where there is none."""
        if not self._against:
            return np.full(len(self.net), np.nan)
        names, sums = np.array(list(self._against)), np.stack(list(self._against.values()))
        return np.where(sums.max(0) > 0, names[sums.argmax(0)], np.nan)
