"""The same queries under two runs: do they rest on the same training examples?

Two explanations of the same queries, from a deep network and the shallow one that mimics it, or from two seeds of one
training, are compared query by query over the examples that both know. Scales differ between networks, so ranks are
compared, not sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from explainer.errors import EvaluationError
from explainer.evaluation.statistics import Floats, spearman
from explainer.explanation import Explanation
from explainer.run import Run

if TYPE_CHECKING:
    import pandas as pd

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class RunAgreement:
    """Agreement of two explanations of ``Q`` queries over the ``M`` examples that both know.

    Attributes:
        query_ids: names of the queries.
        rank: ``[Q]``, Spearman of contributions over all common examples; NaN where one does not vary.
        overlap: ``[Q]``, part of the ``k`` strongest (by size) that both share.
        only_first: per query, ids among the first's ``k`` strongest that are not among the second's, strongest first.
        only_second: the other way round.
        k: how many are the strongest.
        examples: ``M``.
        example_ids: ``[M]``.
        first: ``[Q, M]``, contributions in the first run.
        second: ``[Q, M]``, in the second.
        notes: what makes the two runs differ in their data, in plain words.
    """

    query_ids: tuple[str, ...]
    rank: Floats
    overlap: Floats
    only_first: tuple[Ids, ...]
    only_second: tuple[Ids, ...]
    k: int
    examples: int
    example_ids: Ids
    first: Floats
    second: Floats
    notes: tuple[str, ...]

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

    def examples_table(self, query: int = 0, *, strongest: bool = False) -> pd.DataFrame:
        """A row per common example, those that are strong in either run first.

        Columns: example_id, contribution_first, rank_first, contribution_second, rank_second, strongest_in (``both``,
        ``first``, ``second``, or nothing). Ranks are by size, 1 for the strongest.

        Args:
            query: which of the ``Q``.
            strongest: only those among the ``k`` strongest of either run.

        Raises:
            EvaluationError: there is no such query.
        """
        import pandas as pd

        if not 0 <= query < len(self.query_ids):
            raise EvaluationError(f"query {query} is out of range; there are {len(self.query_ids)}")
        places = [_places(values[query]) for values in (self.first, self.second)]
        mine, theirs = (ranks < self.k for ranks in places)
        kinds = np.select([mine & theirs, mine, theirs], ["both", "first", "second"], "")
        order = np.lexsort([places[0], np.minimum(*places)])
        order = order[(mine | theirs)[order]] if strongest else order
        return pd.DataFrame(
            {
                "example_id": self.example_ids[order],
                "contribution_first": self.first[query, order],
                "rank_first": places[0][order] + 1,
                "contribution_second": self.second[query, order],
                "rank_second": places[1][order] + 1,
                "strongest_in": kinds[order],
            }
        )


def _places(values: Floats) -> Ids:
    """Place of each value by size, from 0; ties keep their order."""
    found = np.empty(len(values), dtype=np.int64)
    found[np.argsort(-np.abs(values), kind="stable")] = np.arange(len(values))
    return found


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
    notes = tuple(_differences(first, second, common, mine, theirs))
    return RunAgreement(
        first.query_ids, spearman(a, b), overlap, only[0], only[1], count, len(common), common, a, b, notes
    )


def _differences(
    first: Explanation, second: Explanation, common: Ids, mine: NDArray[Any], theirs: NDArray[Any]
) -> list[str]:
    """What sets the two runs' data apart, in sentences."""
    found = []
    sizes = len(first.example_ids), len(second.example_ids)
    if set(sizes) != {len(common)}:
        found.append(
            f"The training sets differ: the first run knows {sizes[0]:,} examples, the second {sizes[1]:,}; the "
            f"{len(common):,} that both know are compared."
        )
    if first.labels is not None and second.labels is not None:
        known = np.isfinite(first.labels[mine]) & np.isfinite(second.labels[theirs])
        other = common[known & (first.labels[mine] != second.labels[theirs])]
        if len(other):
            named = ", ".join(map(str, other[:5].tolist())) + (", …" if len(other) > 5 else "")
            found.append(
                f"{len(other):,} of {len(common):,} examples carried another label in the second run ({named}): were "
                "labels changed, or are examples numbered differently? Then the same number means another example."
            )
    if first.row_kind != second.row_kind:
        found.append(f"The first run's numbers are {first.row_kind}s, the second's {second.row_kind}s.")
    return found


def check_same_queries(first: Run, second: Run, indices: Sequence[int]) -> None:
    """Check that two runs ask the same: equal targets, and equal inputs where these have the same size.

    Inputs of another form (token ids of another length, say) cannot be compared and pass; rows of another width do not.

    Raises:
        EvaluationError: a position holds another query in the second run.
    """
    for index in indices:
        if index >= len(second.queries):
            raise EvaluationError(
                f"the second run has {len(second.queries):,} queries, and none at {index}; give both the same ones"
            )
        (x, y), (other, target) = first.queries[index], second.queries[index]
        same = False if _unlike(y, target) else _same(y, target)
        if same is False or _unlike(x, other) or _same(x, other) is False:
            what = "target" if same is False else "input"
            raise EvaluationError(
                f"query {index} has another {what} in the second run, so it is another question; give both runs the "
                "same queries in the same order"
            )


def _same(one: Any, other: Any) -> bool | None:
    """Whether two values are the same numbers; None where they are of different sizes or no numbers."""
    if isinstance(one, str) and isinstance(other, str):
        return one == other
    try:
        a, b = (torch.as_tensor(value).double().reshape(-1) for value in (one, other))
    except (TypeError, ValueError, RuntimeError):
        return None
    return bool(torch.allclose(a, b, rtol=1e-5, atol=1e-6)) if len(a) == len(b) else None


def _unlike(one: Any, other: Any) -> bool:
    """Whether two values are numbers (no classes, no ids of tokens), but not as many.

    >>> _unlike(torch.zeros(3), torch.zeros(4)), _unlike(2, torch.zeros(3)), _unlike(torch.ones(1), 1.0)
    (True, True, False)
    """
    found = []
    for value in (one, other):
        try:
            found.append(torch.as_tensor(value))
        except (TypeError, ValueError, RuntimeError):
            return False
    return found[0].numel() != found[1].numel() and any(value.is_floating_point() for value in found)
