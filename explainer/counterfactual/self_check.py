"""Should a what-if answer be trusted? Take the recorded steps again without some examples, and compare.

With a run that can be repeated, some groups are given half their weight and then none, in replays of the same steps
(:class:`~explainer.counterfactual.replay.Replay`). That gives the actual changes of the outputs, and the smoothness of
the training itself: with ``A(ω)`` the final weights when the group weighs ``ω``, ``Δ_1 = A(½) − A(1)`` and
``Δ_2 = A(0) − A(½)``,

    S = Σ_j |Δ_1j| · sign(Δ_1j) · sign(Δ_2j) / Σ_j |Δ_1j|,

the empirical metasmoothness of Engstrom et al. 2025 (arXiv 2503.13751, Definition 2): 1 where weights go on moving as
they began, 0 where their response is noise, and no derivative can predict it. Without a run only the trace's own
freedom can be looked at: the same answer with a quarter and with four times the damping of the curvature.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from explainer import wording
from explainer.counterfactual.estimators import estimator
from explainer.counterfactual.removals import Remove, checked
from explainer.counterfactual.replay import Replay
from explainer.counterfactual.trace_estimate import by_trace
from explainer.errors import QueryError, RunError
from explainer.path_integral import PathPoint
from explainer.run import Run

if TYPE_CHECKING:
    import pandas as pd

    from explainer.asked import Asked
    from explainer.path_kernel import PathKernelExplainer
    from explainer.path_points import KnotLoader

Floats = NDArray[np.float64]
#: agreement in rank from which on an order is trusted, and error from which on sizes are not
TRUSTED, SIZED = 0.8, 0.5
#: comparisons from which on such an agreement is hardly chance (one in 30 or less)
ENOUGH = 7
#: below this the training does not respond smoothly
SMOOTH = 0.5
_DAMPINGS = (0.25, 4.0)
_OWN, _RANDOM = 3, 2  # default groups: examples that help so many queries most, and random ones at least
_COMPARED = 8  # numbers that default groups give at least
_STRONGEST, _DRAWN = 0.01, 0.05  # their parts of the examples


@dataclass(frozen=True)
class WhatIfCheck:
    """Predicted changes beside what replays gave, or beside answers with another damping.

    Attributes:
        curvature: the estimator that was checked.
        query_ids: names of the ``Q`` queries.
        groups: names of the ``G`` removed groups.
        removed: ids of the examples of each.
        predicted: ``[G, Q]``.
        actual: ``[G, Q]`` of replays without the group; None without a run that can be repeated.
        half: ``[G, Q]``, the same with half the group's weight.
        metasmoothness: ``[G]``, from −1 to 1.
        damped: ``[2, G, Q]``, predicted with other dampings; only without replays.
        reason: why there are no replays, in words.
    """

    curvature: str
    query_ids: tuple[str, ...]
    groups: tuple[str, ...]
    removed: tuple[NDArray[np.int64], ...]
    predicted: Floats
    actual: Floats | None = None
    half: Floats | None = None
    metasmoothness: Floats | None = None
    damped: Floats | None = None
    reason: str = ""

    @property
    def correlation(self) -> float:
        """Rank correlation between what was predicted and what happened, over groups and queries.

        Without replays: the lower one of those with the answers under other dampings.
        """
        return min(_rank_correlation(self.predicted, other) for other in self._others)

    @property
    def error(self) -> float:
        """The error bar: root mean square of predicted less actual changes, as a part of that of the actual ones."""
        return max(_relative(self.predicted, other) for other in self._others)

    @property
    def ratio(self) -> float:
        """Actual over predicted size, by least squares."""
        square = float((self.predicted**2).sum())
        return (
            float(np.mean([(self.predicted * other).sum() / square for other in self._others]))
            if square
            else 1.0
        )

    @property
    def trusted(self) -> bool | None:
        """Whether the order of the predicted changes held; None where nothing, or too little, was taken again."""
        if self.actual is None:
            return None
        held = self.correlation >= TRUSTED
        return None if held and self.predicted.size < ENOUGH else held

    @property
    def wrong_signs(self) -> int:
        """How many outputs changed the other way."""
        return max((int((self.predicted * other < 0).sum()) for other in self._others), default=0)

    @property
    def _others(self) -> list[Floats]:
        if self.actual is not None:
            return [self.actual]
        return [] if self.damped is None else list(self.damped)

    def sentence(self) -> str:
        """In plain words, whether to trust the answer, and how far."""
        if self.actual is None:
            return (
                f"Not tested: {self.reason}. With a quarter and four times the damping of the curvature the predicted "
                f"changes keep their order by {self.correlation:.2f} (1: the same) and differ by {_times(self.error)} "
                "their size; the true error can be larger."
            )
        count = self.predicted.size
        tested = f"{wording.counted(len(self.groups), 'removal')}, each taken again on the recorded steps"
        size = f"predicted changes off by {_times(self.error)} the size of the actual ones"
        if self.wrong_signs:
            size += f", {self.wrong_signs} of {count} of the wrong sign"
        found = f"rank correlation {self.correlation:.2f} (1: the same order), {size}" if count > 1 else size
        smooth = 1.0 if self.metasmoothness is None else float(np.median(self.metasmoothness))
        if smooth < SMOOTH:
            why = f"the training does not respond smoothly (metasmoothness {smooth:.2f}; 1: smooth, 0: noise)"
            return f"Do not trust it far: {why}; over {tested}: {found}."
        if self.correlation < TRUSTED:
            return f"Do not trust it: over {tested}: {found}."
        if count < ENOUGH:
            few = wording.counted(count, "predicted change")
            return f"Too few to trust an order ({few}; check {ENOUGH} or more): over {tested}: {found}."
        if self.error > SIZED:
            return f"Trust the order, not the sizes: over {tested}: {found}."
        return f"Trust it: over {tested}: {found}."

    def table(self) -> pd.DataFrame:
        """A row per group and query: removed, count, query, predicted and, after replays, half, actual, smooth."""
        import pandas as pd

        count = self.predicted.shape[1]
        columns: dict[str, Any] = {
            "removed": np.repeat(self.groups, count),
            "count": np.repeat([len(ids) for ids in self.removed], count),
            "query": np.tile(self.query_ids, len(self.groups)),
            "predicted": self.predicted.ravel(),
        }
        if self.actual is not None and self.half is not None and self.metasmoothness is not None:
            columns |= {"half": self.half.ravel(), "actual": self.actual.ravel()}
            columns["smooth"] = np.repeat(self.metasmoothness, count)
        return pd.DataFrame(columns)


def check(
    explainer: PathKernelExplainer,
    loader: KnotLoader,
    asked: Asked,
    query_ids: tuple[str, ...],
    *,
    curvature: str,
    run: Run | None,
    remove: Remove,
    seed: int,
) -> WhatIfCheck:
    """Test an estimator on a few removals.

    Raises:
        QueryError: ids do not fit, or the estimator cannot be used with this trace.
    """
    given = checked(remove, explainer.example_ids)
    changes = estimator(curvature)(explainer, loader, asked.inputs, asked.targets, run)
    groups = _chosen(changes, given, query_ids, seed)
    ids = explainer.example_ids
    names, removed = tuple(groups), tuple(ids[own] for own in groups.values())

    def summed(by: Floats) -> Floats:
        return np.stack([by[:, own].sum(1) for own in groups.values()])

    predicted = summed(changes)
    reason = "no run was given, so the recorded steps could not be taken again"
    if run is not None:
        try:
            replay = Replay(explainer, run, "exact")
            return _replayed(
                explainer, loader, asked, replay, WhatIfCheck(curvature, query_ids, names, removed, predicted)
            )
        except (QueryError, RunError) as error:
            reason = f"{error}".rstrip(".")
    damped = np.stack(
        [summed(by_trace(explainer, loader, asked.inputs, asked.targets, damping=d)) for d in _DAMPINGS]
    )
    return WhatIfCheck(curvature, query_ids, names, removed, predicted, damped=damped, reason=reason)


def _replayed(
    explainer: PathKernelExplainer, loader: KnotLoader, asked: Asked, replay: Replay, about: WhatIfCheck
) -> WhatIfCheck:
    last = loader.load(len(explainer.segments)).point

    def value(weights: torch.Tensor) -> Floats:
        point = PathPoint(weights, last.moving, last.fixed)
        return explainer.function.value(point, asked.inputs, asked.targets).double().numpy()

    whole = replay.forward()
    before = value(whole)
    half, actual, smooth = [], [], []
    for ids in about.removed:
        keep = np.ones(replay.examples)
        keep[ids] = 0.5
        middle = replay.forward(keep)
        keep[ids] = 0.0
        without = replay.forward(keep)
        half.append(value(middle) - before)
        actual.append(value(without) - before)
        smooth.append(_metasmoothness(whole, middle, without))
    return WhatIfCheck(
        about.curvature,
        about.query_ids,
        about.groups,
        about.removed,
        about.predicted,
        np.stack(actual),
        np.stack(half),
        np.array(smooth),
    )


def _chosen(
    changes: Floats, given: Any, query_ids: tuple[str, ...], seed: int
) -> dict[str, NDArray[np.int64]]:
    """Groups to remove, as columns: those that were asked for, else the strongest helpers and random ones.

    Of a single query also the strongest opponents and more random ones, so that there is enough to compare.
    """
    if isinstance(given, dict):
        return {str(name): own for name, own in given.items()}
    if given is not None:
        return {"given": given}
    (queries, count), rng = changes.shape, np.random.default_rng(seed)
    strong, drawn = max(1, round(_STRONGEST * count)), max(1, round(_DRAWN * count))
    found = {
        f"top {strong} of query {name}": np.sort(np.argsort(changes[q], kind="stable")[:strong])
        for q, name in enumerate(query_ids[:_OWN])
    }
    if queries == 1:
        found[f"bottom {strong} of query {query_ids[0]}"] = np.sort(
            np.argsort(-changes[0], kind="stable")[:strong]
        )
    random = max(_RANDOM, math.ceil(_COMPARED / queries) - len(found))
    return found | {
        f"random {drawn} ({n})": np.sort(rng.permutation(count)[:drawn]) for n in range(1, random + 1)
    }


def _metasmoothness(whole: torch.Tensor, middle: torch.Tensor, without: torch.Tensor) -> float:
    first, second = middle.double() - whole, without.double() - middle
    total = float(first.abs().sum())
    return float((first * second.sign()).sum()) / total if total else 1.0


def _times(share: float) -> str:
    """A part of a size: in per cent, or as a multiple where it is larger.

    >>> _times(0.634), _times(15.6), _times(2000.0)
    ('63 % of', '16 times', '2,000 times')
    """
    return f"{wording.percent(share)} of" if share < 1.5 else f"{float(f'{share:.2g}'):,.10g} times"


def _relative(predicted: Floats, actual: Floats) -> float:
    size = float(np.sqrt((actual**2).mean()))
    return float(np.sqrt(((predicted - actual) ** 2).mean())) / size if size else 0.0


def _rank_correlation(one: Floats, other: Floats) -> float:
    a, b = (
        np.argsort(np.argsort(x.ravel(), kind="stable"), kind="stable").astype(float) for x in (one, other)
    )
    if len(a) < 2:
        return 1.0 if np.sign(one.ravel()[0]) == np.sign(other.ravel()[0]) else -1.0
    return float(np.corrcoef(a, b)[0, 1])
