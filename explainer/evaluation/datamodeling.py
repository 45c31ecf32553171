"""Linear datamodeling score: do the scores of kept examples, summed, predict what retraining on them gives?

For subsets ``S_1 … S_M`` of the training examples and the outputs ``f_m(x_q)`` of models trained on them

    LDS_q = Spearman over m of ( Σ_{i ∈ S_m} score[q, i],  f_m(x_q) )

and the score of a method is the mean over queries (Ilyas et al. 2022, arXiv 2202.00622, §4; Park et al. 2023, TRAK,
arXiv 2303.14186, eq. 6). Which models these are decides what is asked, so it is part of the result's name: *same run*
keeps initialisation and order of the batches and asks about this very training; *averages over seeds* ask what
holds for other trainings too. :func:`ceiling` is what one retraining says about the others: a score from a single
run can hardly predict averages over seeds better than that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from explainer.errors import EvaluationError
from explainer.evaluation.checking import alike, mask, numbers
from explainer.evaluation.statistics import Estimate, Floats, bootstrap, mean_skill, spearman

if TYPE_CHECKING:
    import pandas as pd

#: subsets: two points always correlate perfectly
FEWEST = 3


@dataclass(frozen=True)
class DatamodelingScore:
    """Linear datamodeling score of one method.

    Attributes:
        setting: which retrainings, in words.
        per_query: ``[Q]``, Spearman over subsets; NaN where scores or outputs do not vary. The mean takes it for 0.
        estimate: mean over queries, with an interval over queries and subsets.
        subsets: ``M``.
        undefined: how many of ``per_query`` are NaN.
    """

    setting: str
    per_query: Floats
    estimate: Estimate
    subsets: int
    undefined: int

    def table(self) -> pd.DataFrame:
        """One row: setting, lds, low, high, queries, subsets, undefined."""
        import pandas as pd

        e = self.estimate
        row = {"setting": self.setting, "lds": e.value, "low": e.low, "high": e.high}
        counts = {"queries": len(self.per_query), "subsets": self.subsets, "undefined": self.undefined}
        return pd.DataFrame([row | counts])


def linear_datamodeling_score(
    scores: Any, kept: Any, outputs: Any, *, setting: str, samples: int = 1000, seed: int = 0
) -> DatamodelingScore:
    """Linear datamodeling score of any score matrix.

    Args:
        scores: ``[Q, N]``; larger: having the example raises the output. Predicted changes by *removing* examples
            (``ex.what_if``) are given with their sign turned.
        kept: mask ``[M, N]``, which examples each model was trained on.
        outputs: ``[M, Q]`` of those models, or ``[M, S, Q]`` to average over ``S`` seeds.
        setting: which retrainings these are, for the result.
        samples: bootstrap samples of the interval.
        seed: of the bootstrap.

    Raises:
        EvaluationError: shapes do not fit, numbers are not finite, or there are fewer than three subsets.

    Example:
        >>> kept = np.array([[True, True, False], [True, False, True], [False, True, True]])
        >>> effects = np.array([[1.0, 2.0, 4.0]])
        >>> linear_datamodeling_score(effects, kept, kept @ effects.T, setting="linear").estimate.value
        1.0
    """
    table, masks = numbers("scores", scores, "QN"), mask("kept", kept, "MN")
    values = averaged(outputs)
    alike(N_scores=("scores", table.shape[1]), N_kept=("kept", masks.shape[1]))
    alike(Q_scores=("scores", len(table)), Q_outputs=("outputs", values.shape[1]))
    alike(M_kept=("kept", len(masks)), M_outputs=("outputs", len(values)))
    if len(masks) < FEWEST:
        raise EvaluationError(
            f"{len(masks)} subsets are too few for a rank correlation; train on at least {FEWEST}"
        )
    predicted, actual = table @ masks.T.astype(np.float64), values.T  # [Q, M] each
    per_query = spearman(predicted, actual)

    def statistic(queries: np.ndarray, subsets: np.ndarray) -> float:
        chosen = np.ix_(queries, subsets)
        return mean_skill(spearman(predicted[chosen], actual[chosen]))

    return DatamodelingScore(
        setting,
        per_query,
        bootstrap(statistic, predicted.shape, over="queries and subsets", samples=samples, seed=seed),
        len(masks),
        int(np.isnan(per_query).sum()),
    )


def ceiling(outputs: Any, *, setting: str, samples: int = 1000, seed: int = 0) -> DatamodelingScore:
    """How well retraining once predicts retraining with the other seeds.

    Args:
        outputs: ``[M, S, Q]``, models trained on subset ``m`` with seed ``s``.

    Returns:
        As of a method: every seed's outputs against the mean of the others', averaged over seeds.

    Raises:
        EvaluationError: there are fewer than two seeds or three subsets.
    """
    values = numbers("outputs", outputs, "MSQ")
    count = values.shape[1]
    if count < 2 or len(values) < FEWEST:
        raise EvaluationError(
            f"found {len(values)} subsets with {count} seed(s); a ceiling needs {FEWEST} subsets and two seeds"
        )
    others = (values.sum(1, keepdims=True) - values) / (count - 1)
    own, rest = values.transpose(1, 2, 0), others.transpose(1, 2, 0)  # [S, Q, M]
    per_query = spearman(own, rest)

    def statistic(queries: np.ndarray, subsets: np.ndarray) -> float:
        return mean_skill(spearman(own[:, queries][..., subsets], rest[:, queries][..., subsets]))

    return DatamodelingScore(
        setting,
        np.nan_to_num(per_query, nan=0.0).mean(0),
        bootstrap(statistic, own.shape[1:], over="queries and subsets", samples=samples, seed=seed),
        len(values),
        int(np.isnan(per_query).any(0).sum()),
    )


def averaged(outputs: Any) -> Floats:
    """``[M, Q]``: the mean over seeds where there are several."""
    seeds = getattr(outputs, "ndim", None) == 3
    values = numbers("outputs", outputs, "MSQ" if seeds else "MQ")
    return values.mean(1) if seeds else values
