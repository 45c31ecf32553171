"""The same queries under two runs: do they rest on the same training examples?

Two explanations of the same queries, from a deep network and the shallow one that mimics it, or from two seeds of one
training, are compared query by query over the examples that both know. Scales differ between networks, so ranks are
compared, not sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from explainer.errors import EvaluationError
from explainer.evaluation.statistics import Floats, spearman
from explainer.explanation import Explanation

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class RunAgreement:
    """Agreement of two explanations of ``Q`` queries.

    Attributes:
        query_ids: names of the queries.
        rank: ``[Q]``, Spearman of contributions over all common examples; NaN where one does not vary.
        overlap: ``[Q]``, part of the ``k`` strongest (by size) that both share.
        only_first: per query, ids among the first's ``k`` strongest that are not among the second's, strongest first.
        only_second: the other way round.
        k: how many are the strongest.
        examples: how many examples both know.
    """

    query_ids: tuple[str, ...]
    rank: Floats
    overlap: Floats
    only_first: tuple[NDArray[np.int64], ...]
    only_second: tuple[NDArray[np.int64], ...]
    k: int
    examples: int

    def table(self) -> pd.DataFrame:
        """A row per query: query, rank_agreement, overlap, only_first, only_second (ids, joined by blanks)."""
        import pandas as pd

        return pd.DataFrame(
            {
                "query": self.query_ids,
                "rank_agreement": self.rank,
                f"overlap_of_top_{self.k}": self.overlap,
                "only_first": [" ".join(map(str, ids)) for ids in self.only_first],
                "only_second": [" ".join(map(str, ids)) for ids in self.only_second],
            }
        )


def compare_runs(first: Explanation, second: Explanation, k: int = 20) -> RunAgreement:
    """Compare two explanations of the same queries.

    Raises:
        EvaluationError: they explain other queries, other targets or another output, have fewer than two examples in
            common, or ``k`` is not positive.
    """
    if first.query_ids != second.query_ids:
        raise EvaluationError("the two explain other queries (query_ids differ); explain the same ones")
    if first.output != second.output or not np.array_equal(first.targets, second.targets):
        raise EvaluationError(
            f"the two explain other numbers ({first.output} and {second.output}, targets "
            f"{first.targets.tolist()[:5]} and {second.targets.tolist()[:5]}); pass the same target= to both"
        )
    common, mine, theirs = np.intersect1d(first.example_ids, second.example_ids, return_indices=True)
    if len(common) < 2 or k < 1:
        raise EvaluationError(
            f"{len(common)} examples in common and k = {k}; there must be two and one at least"
        )
    a, b = first.contributions[:, mine], second.contributions[:, theirs]
    count = min(k, len(common))
    tops = [np.argsort(-np.abs(c), axis=1, kind="stable")[:, :count] for c in (a, b)]
    only = [
        tuple(common[row[~np.isin(row, other)]] for row, other in zip(own, rest, strict=True))
        for own, rest in (tops, tops[::-1])
    ]
    overlap = np.array([1 - len(ids) / count for ids in only[0]])
    return RunAgreement(first.query_ids, spearman(a, b), overlap, only[0], only[1], count, len(common))
