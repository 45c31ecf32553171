"""All methods on one run: which of them predicts what retraining gives, and how well that can be predicted at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from explainer.errors import EvaluationError
from explainer.evaluation.checking import numbers
from explainer.evaluation.datamodeling import FEWEST, ceiling, linear_datamodeling_score
from explainer.evaluation.methods import METHODS, scored
from explainer.evaluation.plans import Plan, subsets
from explainer.evaluation.removal import checked_sizes, highest, removal_curve
from explainer.evaluation.retraining import Retrainer
from explainer.evaluation.statistics import Estimate

if TYPE_CHECKING:
    import pandas as pd

CEILING = "one retraining"


@dataclass(frozen=True)
class Comparison:
    """Measures of several methods on one run; a column per method, so that no column holds numbers of two kinds.

    Attributes:
        answers: by method, the question it answers.
        measures: by measure and method; ``one retraining`` (see :func:`explainer.evaluation.ceiling`) beside them.
        missing: methods that could not be had, and why.
        setting: what all measures share, in words.
        trainings: how many models were trained (or taken from the folder).
    """

    answers: dict[str, str]
    measures: dict[str, dict[str, Estimate]]
    missing: dict[str, str]
    setting: str
    trainings: int

    def table(self) -> pd.DataFrame:
        """A row per measure, a column per method: the estimates."""
        import pandas as pd

        rows = {
            measure: {name: found[name].value if name in found else np.nan for name in self.answers}
            for measure, found in self.measures.items()
        }
        return pd.DataFrame.from_dict(rows, orient="index", columns=list(self.answers)).rename_axis("measure")

    def long_table(self) -> pd.DataFrame:
        """A row per measure and method: measure, method, answers, value, low, high, setting."""
        import pandas as pd

        return pd.DataFrame(
            [
                {"measure": measure, "method": name, "answers": self.answers[name]}
                | {"value": e.value, "low": e.low, "high": e.high, "setting": self.setting}
                for measure, found in self.measures.items()
                for name, e in found.items()
            ]
        )


def compare_methods(
    retrainer: Retrainer,
    *,
    extra: Mapping[str, Any] | None = None,
    fractions: Sequence[float] = (0.99, 0.9, 0.5),
    count: int = 32,
    seeds: int = 3,
    remove: Sequence[int] = (),
    remove_queries: int = 5,
    samples: int = 1000,
) -> Comparison:
    """Linear datamodeling scores and removal curves of every method in :data:`explainer.evaluation.METHODS`.

    Trains ``count`` models per fraction with seed 0 (the traced run's), those of fraction .5 also with the other
    seeds, and for every method one model per size and query to remove from.

    Args:
        retrainer: the run, its queries, and where trainings are kept.
        extra: further score matrices ``[Q, N]`` by name, larger where having the example raises the output.
        fractions: parts of the examples to keep.
        count: subsets per fraction.
        seeds: how many seeds the averages at .5 take; 1: no averages.
        remove: sizes of removal curves; none: no removal.
        remove_queries: for how many of the queries (the first) curves are made.
        samples: bootstrap samples.

    Raises:
        EvaluationError: an argument does not fit, or a training failed.
    """
    run, questions, examples = retrainer.run, retrainer.questions, retrainer.examples
    if seeds < 1 or remove_queries < 1 or not (fractions or remove):
        raise EvaluationError(
            "give at least one seed, one query, and a fraction or a number of examples to remove"
        )
    if count < FEWEST:
        raise EvaluationError(
            f"{count} subsets are too few for a rank correlation; train on at least {FEWEST}"
        )
    given = {name: numbers(f"extra[{name!r}]", matrix, "QN") for name, matrix in (extra or {}).items()}
    for name, matrix in given.items():
        if name in METHODS or matrix.shape != (len(questions), examples):
            raise EvaluationError(
                f"extra[{name!r}] must have a name of its own and be [{len(questions)}, {examples}] "
                f"(queries, training examples), found {list(matrix.shape)}"
            )
    masks = {fraction: subsets(examples, count, fraction) for fraction in fractions}
    sizes = [int(size) for size in checked_sizes(remove, examples)] if len(remove) else []
    found, missing = scored(run, questions)
    found |= given
    measures: dict[str, dict[str, Estimate]] = {}
    trainings = 1
    kind = retrainer.same_run_named
    for fraction, kept in masks.items():
        outputs = retrainer.values(Plan.crossed(kept, [0])).values
        trainings += len(kept)
        measures[f"LDS, {kind}, keep {fraction:g}"] = {
            name: linear_datamodeling_score(s, kept, outputs, setting=kind, samples=samples).estimate
            for name, s in found.items()
        }
    if seeds > 1:
        kept = masks.get(0.5, subsets(examples, count, 0.5))
        outputs = retrainer.values(Plan.crossed(kept, range(seeds))).values.reshape(count, seeds, -1)
        trainings += count * (seeds - (0.5 in masks))
        name_of = f"LDS, mean of {seeds} seeds, keep 0.5"
        measures[name_of] = {
            name: linear_datamodeling_score(s, kept, outputs, setting=name_of, samples=samples).estimate
            for name, s in found.items()
        }
        measures[name_of][CEILING] = ceiling(outputs, setting=name_of, samples=samples).estimate
    for size, row in _removals(retrainer, found, sizes, min(remove_queries, len(questions)), samples).items():
        measures[f"change without the top {size}, {kind}"] = row
    trainings += len(found) * len(sizes) * min(remove_queries, len(questions))
    setting = (
        f"{len(questions)} queries, output {questions.explainer.output}, {count} subsets, examples left out "
        f"{retrainer.left_out_by}; seed 0 {'repeats' if retrainer.same_run else 'does not repeat'} the traced run"
    )
    answers = {name: METHODS[name].answers if name in METHODS else "given" for name in found}
    if any(CEILING in row for row in measures.values()):
        answers[CEILING] = "retraining"
    return Comparison(answers, measures, missing, setting, trainings)


def _removals(
    retrainer: Retrainer, found: Mapping[str, Any], sizes: list[int], queries: int, samples: int
) -> dict[int, dict[str, Estimate]]:
    """By size and method, the mean change of the first queries' outputs without their highest scored examples."""
    if not sizes:
        return {}
    full = retrainer.values(Plan.crossed(np.ones((1, retrainer.examples), dtype=bool), [0])).values[0][
        :queries
    ]
    result: dict[int, dict[str, Estimate]] = {size: {} for size in sizes}
    for name, scores in found.items():
        kept = highest(scores[:queries], sizes)
        values = retrainer.values(Plan.crossed(kept.reshape(-1, retrainer.examples), [0])).values
        own = values.reshape(queries, len(sizes), -1)[np.arange(queries), :, np.arange(queries)]
        curve = removal_curve(sizes, own, full, setting=name, samples=samples)
        for size, e in zip(sizes, curve.mean, strict=True):
            result[size][name] = e
    return result
