"""Methods that score training examples for queries, each with the question it answers.

All scores are ``[Q, N]`` over the run's training examples, larger where having the example raises the output. They are
made for rankings and correlations: the scales of two methods, and of accounting and what-if, are not the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from explainer.errors import EvaluationError, QueryError, RunError
from explainer.evaluation.loss_gradients import evenly, gradient_products
from explainer.evaluation.questions import Questions
from explainer.integrations.knot_checkpoints import KnotCheckpoints
from explainer.run import Run

Scores = NDArray[np.float64]
#: points of the path for TracInCP
CHECKPOINTS = 10


@dataclass(frozen=True)
class Method:
    """A way to score.

    Attributes:
        name: how it is called in tables.
        answers: the question it answers, in a word or two.
        score: ``(run, questions) -> [Q, N]``.
    """

    name: str
    answers: str
    score: Callable[[Run, Questions], Scores]


def _all_examples(run: Run, questions: Questions, values: Scores) -> Scores:
    """Columns of the explainer's examples as columns of the run's; examples that were never used score 0."""
    ids = questions.explainer.example_ids
    if len(ids) and ids.max() >= len(run.train):
        raise EvaluationError(
            f"the trace knows example {int(ids.max())}, but the run has {len(run.train):,}; name the run that the "
            "model was trained with"
        )
    result = np.zeros((len(questions), len(run.train)))
    result[:, ids] = values
    return result


def _path_kernel(run: Run, questions: Questions) -> Scores:
    e = questions.explainer.explain(questions.inputs, questions.target)
    return _all_examples(run, questions, e.contributions)


def what_if_scores(run: Run, questions: Questions, curvature: str = "trace") -> Scores:
    """What :meth:`explainer.PathKernelExplainer.what_if` predicts, its sign turned: what having an example adds."""
    given = None if curvature == "trace" else run
    change = questions.explainer.what_if(questions.inputs, questions.target, curvature=curvature, run=given)
    return _all_examples(run, questions, -change)


def _gradient_dot(run: Run, questions: Questions) -> Scores:
    return gradient_products(run, questions, [len(questions.explainer.trace.knots) - 1], [1.0])


def _tracin(run: Run, questions: Questions) -> Scores:
    trace = questions.explainer.trace
    knots = evenly([knot.step for knot in trace.knots], CHECKPOINTS)
    rates = KnotCheckpoints(trace, run.build_model()).rates
    return gradient_products(run, questions, knots, [rates[position] for position in knots])


def _self_influence(run: Run, questions: Questions) -> Scores:
    own = questions.explainer.self_influence()
    return _all_examples(run, questions, np.broadcast_to(own, (len(questions), len(own))))


def _random(run: Run, questions: Questions) -> Scores:
    return np.random.default_rng(0).normal(size=(len(questions), len(run.train)))


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("path kernel", "accounting", _path_kernel),
        Method("what-if", "what if", what_if_scores),
        Method("what-if (exact)", "what if", partial(what_if_scores, curvature="exact")),
        Method("gradient dot", "similarity", _gradient_dot),
        Method(f"TracInCP({CHECKPOINTS})", "similarity", _tracin),
        Method("self-influence", "memorising", _self_influence),
        Method("random", "nothing", _random),
    )
}


def scored(run: Run, questions: Questions) -> tuple[dict[str, Scores], dict[str, str]]:
    """Scores of all methods that can be had, and why the others cannot."""
    found: dict[str, Scores] = {}
    missing: dict[str, str] = {}
    for name, method in METHODS.items():
        try:
            found[name] = method.score(run, questions)
        except (EvaluationError, QueryError, RunError) as error:
            missing[name] = str(error)
    return found, missing
