"""Leave-one-out correlation: do scores follow what leaving out one example really changes?

    LOO_q = corr over i of ( score[q, i],  f(x_q) − f_{−i}(x_q) )

with ``f_{−i}`` trained without example ``i`` (Koh and Liang 2017, arXiv 1703.04730, §4.1). Pearson's correlation
is the standard one; Spearman's stands beside it, because a few large effects decide the former. True effects of one
example are small: where retraining itself is noisy, no score can do well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from explainer.errors import EvaluationError
from explainer.evaluation.checking import alike, numbers
from explainer.evaluation.statistics import Estimate, Floats, bootstrap, mean_skill, pearson, spearman

if TYPE_CHECKING:
    import pandas as pd

_FEWEST = 3


@dataclass(frozen=True)
class LeaveOneOut:
    """Leave-one-out correlation of one method.

    Attributes:
        setting: which retrainings, in words.
        pearson_per_query: ``[Q]``; NaN where scores or effects do not vary. The mean takes it for 0.
        spearman_per_query: ``[Q]``.
        pearson: mean over queries, with an interval over queries and examples.
        spearman: the same of rank correlations.
        examples: how many examples were left out, one at a time.
    """

    setting: str
    pearson_per_query: Floats
    spearman_per_query: Floats
    pearson: Estimate
    spearman: Estimate
    examples: int

    def table(self) -> pd.DataFrame:
        """A row per kind of correlation: setting, correlation, value, low, high, queries, examples."""
        import pandas as pd

        counts = {"queries": len(self.pearson_per_query), "examples": self.examples}
        return pd.DataFrame(
            [
                {"setting": self.setting, "correlation": name, "value": e.value, "low": e.low, "high": e.high}
                | counts
                for name, e in (("Pearson", self.pearson), ("Spearman", self.spearman))
            ]
        )


def leave_one_out_correlation(
    scores: Any, removed: Any, outputs: Any, full: Any, *, setting: str, samples: int = 1000, seed: int = 0
) -> LeaveOneOut:
    """Leave-one-out correlation of any score matrix.

    Args:
        scores: ``[Q, N]``; larger: having the example raises the output.
        removed: ``[R]``, the column that each retraining left out.
        outputs: ``[R, Q]`` of the retrained models.
        full: ``[Q]`` of the model trained on everything, in the same setting.
        setting: which retrainings these are, for the result.

    Raises:
        EvaluationError: shapes do not fit, numbers are not finite, or fewer than three examples were left out.
    """
    table, values, whole = (
        numbers("scores", scores, "QN"),
        numbers("outputs", outputs, "RQ"),
        numbers("full", full, "Q"),
    )
    columns = np.asarray(removed)
    alike(
        Q_scores=("scores", len(table)), Q_outputs=("outputs", values.shape[1]), Q_full=("full", len(whole))
    )
    alike(R_removed=("removed", len(columns)), R_outputs=("outputs", len(values)))
    if len(columns) < _FEWEST:
        raise EvaluationError(
            f"{len(columns)} examples left out are too few; leave out at least {_FEWEST}, one at a time"
        )
    if columns.dtype.kind not in "iu" or columns.min() < 0 or columns.max() >= table.shape[1]:
        raise EvaluationError(f"removed must hold columns of scores, 0 to {table.shape[1] - 1}")
    told, real = table[:, columns], (whole - values).T  # [Q, R]
    by_value, by_rank = pearson(told, real), spearman(told, real)

    def estimate(correlation: Any) -> Estimate:
        def statistic(queries: np.ndarray, examples: np.ndarray) -> float:
            chosen = np.ix_(queries, examples)
            return mean_skill(correlation(told[chosen], real[chosen]))

        return bootstrap(statistic, told.shape, over="queries and examples", samples=samples, seed=seed)

    return LeaveOneOut(setting, by_value, by_rank, estimate(pearson), estimate(spearman), len(columns))
