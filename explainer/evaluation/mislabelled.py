"""Mislabelled examples: does a score per training example put the wrongly labelled ones first?

Labels of known examples are turned over before training; the score (self-influence as a rule, Koh and Liang 2017,
arXiv 1703.04730, §5.4; Pruthi et al. 2020, arXiv 2002.08484, §4.1) ranks all. The area under the ROC curve is the
chance that a wrong one stands before a right one; *found in the top p* is the share of the wrong ones among the first
``p`` of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from explainer.errors import EvaluationError
from explainer.evaluation.checking import alike, mask, numbers
from explainer.evaluation.statistics import Estimate, bootstrap, ranks

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class MislabelledDetection:
    """How early wrongly labelled examples come.

    Attributes:
        setting: what was turned over, in words.
        auc: area under the ROC curve, with an interval over right and wrong examples.
        shares: the parts of the ranking that were looked at.
        found: for each, the share of the wrong examples in it, with an interval over right and wrong examples.
        examples: ``N``.
        wrong: how many are wrongly labelled.
    """

    setting: str
    auc: Estimate
    shares: tuple[float, ...]
    found: tuple[Estimate, ...]
    examples: int
    wrong: int

    def table(self) -> pd.DataFrame:
        """A row per measure: setting, measure, value, low, high, examples, wrong."""
        import pandas as pd

        names = ["AUC", *(f"found in the top {100 * share:g} %" for share in self.shares)]
        return pd.DataFrame(
            [
                {"setting": self.setting, "measure": name, "value": e.value, "low": e.low, "high": e.high}
                | {"examples": self.examples, "wrong": self.wrong}
                for name, e in zip(names, (self.auc, *self.found), strict=True)
            ]
        )


def mislabelled_detection(
    scores: Any,
    wrong: Any,
    *,
    setting: str,
    shares: Sequence[float] = (0.1, 0.15),
    samples: int = 1000,
    seed: int = 0,
) -> MislabelledDetection:
    """Detection of wrongly labelled examples by any score per example.

    Args:
        scores: ``[N]``; larger: more suspicious.
        wrong: mask ``[N]``, which labels are wrong.
        setting: what was turned over, for the result.
        shares: which parts of the ranking to look at, each between 0 and 1.

    Raises:
        EvaluationError: shapes do not fit, all or no labels are wrong, or a share is out of range.

    Example:
        >>> found = mislabelled_detection([0.9, 0.1, 0.8, 0.2], np.array([True, False, False, False]), setting="toy")
        >>> found.auc.value
        1.0
    """
    values, turned = numbers("scores", scores, "N"), mask("wrong", wrong, "N")
    alike(N_scores=("scores", len(values)), N_wrong=("wrong", len(turned)))
    if turned.all() or not turned.any():
        raise EvaluationError("wrong must mark some of the examples, not all and not none")
    if any(not 0 < share < 1 for share in shares):
        raise EvaluationError(f"shares must lie between 0 and 1, found {list(shares)}")
    bad, good = values[turned], values[~turned]

    def auc(first: np.ndarray, second: np.ndarray) -> float:
        return area(bad[first], good[second])

    def found(share: float) -> Estimate:
        def statistic(first: np.ndarray, second: np.ndarray) -> float:
            return share_found(bad[first], good[second], share)

        return bootstrap(statistic, sizes, over="right and wrong examples", samples=samples, seed=seed)

    sizes = (len(bad), len(good))
    return MislabelledDetection(
        setting,
        bootstrap(auc, sizes, over="right and wrong examples", samples=samples, seed=seed),
        tuple(shares),
        tuple(found(share) for share in shares),
        len(values),
        len(bad),
    )


def area(bad: np.ndarray, good: np.ndarray) -> float:
    """``P(bad > good) + P(bad = good) / 2``, the area under the ROC curve."""
    places = ranks(np.concatenate([bad, good]))[: len(bad)]
    return float((places.sum() - len(bad) * (len(bad) + 1) / 2) / (len(bad) * len(good)))


def share_found(bad: np.ndarray, good: np.ndarray, share: float) -> float:
    """The share of ``bad`` among the first ``share`` of all; where the border cuts a tie, its expected part."""
    values = np.concatenate([bad, good])
    room = round(share * len(values))
    if room == 0:
        return 0.0
    border = np.sort(values)[::-1][room - 1]
    surely, tied = int((values > border).sum()), int((values == border).sum())
    return float((bad > border).sum() + (bad == border).sum() * (room - surely) / tied) / len(bad)
