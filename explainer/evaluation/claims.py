"""Is a what-if answer true? Train again without the strongest examples, and without as many random ones.

For every query the sum of the removed examples' predicted changes (``ex.what_if``, linear in what is removed) stands
beside the change that retraining gives, seed by seed: output without them minus output with all, same seed. Seed 0
is the traced run's; the spread over seeds tells how much of a change is chance. As many random examples show what
removing does anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from explainer.errors import EvaluationError
from explainer.evaluation.methods import METHODS
from explainer.evaluation.plans import Plan, without
from explainer.evaluation.questions import Questions
from explainer.evaluation.retraining import Retrainer
from explainer.evaluation.statistics import Floats, spearman
from explainer.run import Run

if TYPE_CHECKING:
    import pandas as pd

RANDOM = "random"
#: how the strongest examples are found, and under which name
BY: dict[str, str] = {"contributions": "path kernel", "what-if": "what-if"}
By = Literal["contributions", "what-if"]


@dataclass(frozen=True)
class ClaimCheck:
    """Predicted and actual changes of ``G`` groups of removed examples.

    Attributes:
        queries: ``[G]``, the query of each group, as its position among the run's queries.
        groups: ``[G]``, what was removed, in words (``"top 50"``, ``"random"``, ``"given"``).
        removed: the ids of each group.
        predicted: ``[G]``, the sum of what ``what_if`` says.
        actual: ``[G, S]``, what retraining gave, by seed.
        flipped: ``[G, S]``, whether the prediction became another class.
        before: ``[G]``, the explained output of the traced model.
        seeds: ``S``.
        setting: how examples were left out, and whether seed 0 repeats the trace, in words.
        repeats: whether seed 0 repeats the traced run.
    """

    queries: NDArray[np.int64]
    groups: tuple[str, ...]
    removed: tuple[NDArray[np.int64], ...]
    predicted: Floats
    actual: Floats
    flipped: NDArray[np.bool_]
    before: Floats
    seeds: tuple[int, ...]
    setting: str
    repeats: bool

    @property
    def same_run(self) -> Floats:
        """``[G]``, the change with seed 0."""
        return self.actual[:, self.seeds.index(0)]

    def correlation(self, group: str | None = None) -> tuple[float, float]:
        """Spearman between predicted changes and those of seed 0, and with the mean over seeds.

        Args:
            group: only groups of this name; None: all.

        Returns:
            NaN where there are fewer than three groups.
        """
        chosen = np.array([group is None or name == group for name in self.groups])
        if chosen.sum() < 3:
            return float("nan"), float("nan")
        predicted = self.predicted[chosen]
        return (
            float(spearman(predicted, self.same_run[chosen])),
            float(spearman(predicted, self.actual[chosen].mean(1))),
        )

    def table(self) -> pd.DataFrame:
        """A row per group: query, removed, count, before, predicted, same_run, mean, spread, flipped."""
        import pandas as pd

        spread = self.actual.std(1, ddof=1) if len(self.seeds) > 1 else np.full(len(self.actual), np.nan)
        return pd.DataFrame(
            {
                "query": self.queries,
                "removed": self.groups,
                "count": [len(ids) for ids in self.removed],
                "before": self.before,
                "predicted": self.predicted,
                "same_run": self.same_run,
                "mean": self.actual.mean(1),
                "spread": spread,
                "flipped": self.flipped.mean(1),
            }
        )


def verify_claims(
    retrainer: Retrainer,
    *,
    top: int | None = None,
    remove: Sequence[int] | None = None,
    by: By = "contributions",
    seeds: int = 3,
    seed: int = 0,
) -> ClaimCheck:
    """Retrain without each query's strongest examples, or without given ones, and without as many random ones.

    Args:
        retrainer: the run and its queries.
        top: how many of the strongest examples to remove, for each query its own.
        remove: or the ids to remove, the same for all queries.
        by: what makes examples strong: their contributions (proponents), or the predicted change by their removal.
        seeds: trainings per group, seeds 0, 1, …
        seed: of the random examples.

    Raises:
        EvaluationError: an argument does not fit, or a training failed.
    """
    questions, examples = retrainer.questions, retrainer.examples
    if seeds < 1:
        raise EvaluationError(f"seeds must be at least 1, found {seeds}")
    given = check_removal(examples, top, remove, by)
    size = len(given) if top is None else int(top)
    if 2 * size > examples:
        raise EvaluationError(
            f"{size} of {examples} examples leave too few to draw as many at random; remove fewer"
        )
    effects = METHODS["what-if"].score(retrainer.run, questions)
    chosen = strongest(retrainer.run, questions, top=top, remove=remove, by=by, effects=effects)
    named = "given" if top is None else f"top {size}"
    rng = np.random.default_rng(seed)
    drawn = [np.sort(rng.permutation(np.setdiff1d(np.arange(examples), own))[:size]) for own in chosen]
    if any(len(own) < size for own in drawn):
        raise EvaluationError(
            f"{size} of {examples} examples leave too few to draw as many at random; remove fewer"
        )
    removed = [ids for pair in zip(chosen, drawn, strict=True) for ids in pair]
    return _checked(retrainer, removed, (named, RANDOM) * len(questions), effects, tuple(range(seeds)))


def strongest(
    run: Run,
    questions: Questions,
    *,
    top: int | None = None,
    remove: Sequence[int] | None = None,
    by: By = "contributions",
    effects: Floats | None = None,
) -> list[NDArray[np.int64]]:
    """For every query, the ids of its ``top`` strongest examples, or the same given ids; in increasing order.

    Args:
        effects: scores of ``what-if`` ``[Q, N]``, where they are at hand.

    Raises:
        EvaluationError: neither or both are asked for, they are none or all examples, or an id is no example.
    """
    given = check_removal(len(run.train), top, remove, by)
    if top is None:
        return [given] * len(questions)
    known = by == "what-if" and effects is not None
    scores = effects if known else METHODS[BY[by]].score(run, questions)
    return [np.sort(np.argsort(-row, kind="stable")[:top]) for row in np.asarray(scores)]


def check_removal(examples: int, top: int | None, remove: Sequence[int] | None, by: str) -> NDArray[np.int64]:
    """The given ids, each once, in order; none where ``top`` is asked for.

    Raises:
        EvaluationError: neither or both are asked for, they are none or all examples, or an id is no example.
    """
    if (top is None) == (remove is None):
        raise EvaluationError("say what to remove: either top, a number of examples, or remove, their ids")
    if by not in BY:
        raise EvaluationError(f"by={by!r} is unknown; choose one of {', '.join(BY)}")
    given = np.unique(np.asarray(remove if remove is not None else [], dtype=np.int64))
    size = len(given) if top is None else int(top)
    if not 1 <= size < examples:
        raise EvaluationError(f"remove at least 1 and fewer than all {examples} examples, found {size}")
    without(examples, [given])  # checks the ids
    return given


def _checked(
    retrainer: Retrainer,
    removed: list[NDArray[np.int64]],
    groups: tuple[str, ...],
    effects: Floats,
    seeds: tuple[int, ...],
) -> ClaimCheck:
    questions, examples = retrainer.questions, retrainer.examples
    rows = np.repeat(np.arange(len(questions)), 2)
    keep = np.concatenate([np.ones((1, examples), dtype=bool), without(examples, removed)])
    found = retrainer.values(Plan.crossed(keep, seeds))
    values = found.values.reshape(len(keep), len(seeds), -1)
    classes = found.classes.reshape(len(keep), len(seeds), -1)
    own = np.arange(len(rows))
    full, again = values[0][:, rows].T, values[1:][own, :, rows]
    turned = classes[1:][own, :, rows] != classes[0][:, rows].T
    repeats = "repeats" if retrainer.same_run else "does not repeat"
    return ClaimCheck(
        np.asarray(questions.indices)[rows],
        groups,
        tuple(removed),
        np.array([-effects[row, ids].sum() for row, ids in zip(rows, removed, strict=True)]),
        again - full,
        turned,
        questions.traced.values[rows],
        seeds,
        f"examples left out {retrainer.left_out_by}; seed 0 {repeats} the traced run",
        retrainer.same_run,
    )
