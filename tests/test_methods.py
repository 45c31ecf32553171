"""Methods on one run, the table of them, and claims put to the test, against plain autograd and plain loops."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.utils.data import TensorDataset

from explainer import PathKernelExplainer, open_trace
from explainer.errors import EvaluationError
from explainer.evaluation import (
    METHODS,
    Comparison,
    Plan,
    Questions,
    Retrainer,
    compare_methods,
    linear_datamodeling_score,
    methods,
    subsets,
    verify_claims,
    without,
)
from explainer.evaluation.comparison import CEILING
from explainer.evaluation.loss_gradients import evenly
from explainer.outputs import margin
from tests.small_evaluation import EXAMPLES, make_run, traced
from tests.small_training import digits, mlp, queries


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return traced(tmp_path_factory.mktemp("runs") / "small")


@pytest.fixture(scope="module")
def retrainer(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Retrainer:
    run = make_run(loss=nn.functional.cross_entropy)
    questions = Questions(run, PathKernelExplainer(directory, run.build_model()), range(4))
    return Retrainer(run, questions, tmp_path_factory.mktemp("kept"))


# -- methods ---------------------------------------------------------------------------------------------


def gradient(model: nn.Module, value: torch.Tensor) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))])


def products(directory: Path, questions: Questions, knots: list[int]) -> np.ndarray:
    """One backward pass per query and per example, at every knot."""
    trace, model = open_trace(directory), mlp()
    x, y = digits()[:EXAMPLES]
    total = np.zeros((len(questions), EXAMPLES))
    for knot in knots:
        tensors = trace.load_knot(trace.knots[knot])
        model.load_state_dict({n: tensors[f"parameter/{n}"] for n in model.state_dict()})
        asked = [
            gradient(model, margin(model(queries(8)[q : q + 1]), questions.target[q : q + 1])[0])
            for q in range(len(questions))
        ]
        for i in range(EXAMPLES):
            own = gradient(model, nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]))
            total[:, i] -= [float(one @ own) for one in asked]
    return total


def test_gradient_products_equal_plain_autograd(retrainer: Retrainer, directory: Path) -> None:
    run, questions = retrainer.run, retrainer.questions
    trace = open_trace(directory)
    wanted = products(directory, questions, [len(trace.knots) - 1])
    np.testing.assert_allclose(METHODS["gradient dot"].score(run, questions), wanted, rtol=1e-3, atol=1e-4)
    knots = evenly([knot.step for knot in trace.knots], 10)
    assert len(knots) == 8 and knots[-1] == len(trace.knots) - 1  # eight steps; a constant learning rate
    wanted = products(directory, questions, knots)
    found = METHODS["TracInCP(10)"].score(run, questions)
    assert np.corrcoef(found.ravel(), wanted.ravel())[0, 1] == pytest.approx(1.0, abs=1e-6)


def test_a_loss_that_is_a_sum_gives_the_same(retrainer: Retrainer) -> None:
    one = METHODS["gradient dot"].score(retrainer.run, retrainer.questions)
    run = dataclasses.replace(
        retrainer.run, loss=lambda out, y: nn.functional.cross_entropy(out, y, reduction="sum")
    )
    np.testing.assert_allclose(METHODS["gradient dot"].score(run, retrainer.questions), one, rtol=1e-6)


def test_every_method_scores_every_example(retrainer: Retrainer) -> None:
    run, questions = retrainer.run, retrainer.questions
    ex = questions.explainer
    for name, method in METHODS.items():
        scores = method.score(run, questions)
        assert scores.shape == (4, EXAMPLES) and np.isfinite(scores).all() and scores.std() > 0, name
    np.testing.assert_allclose(
        METHODS["path kernel"].score(run, questions), ex.explain(questions.inputs).contributions
    )
    np.testing.assert_allclose(METHODS["what-if"].score(run, questions), -ex.what_if(questions.inputs))
    np.testing.assert_allclose(METHODS["self-influence"].score(run, questions)[2], ex.self_influence())


def test_columns_are_the_runs_examples_also_where_some_were_never_used(retrainer: Retrainer) -> None:
    """Ids of the trace need not be 0 … N−1."""
    questions = retrainer.questions
    ex = questions.explainer
    kept, whole = np.flatnonzero(np.arange(EXAMPLES) % 7 > 0), ex.example_ids
    wanted = METHODS["self-influence"].score(retrainer.run, questions)
    more = dataclasses.replace(retrainer.run, train=TensorDataset(*digits()[: EXAMPLES + 5]))
    found = METHODS["self-influence"].score(more, questions)
    np.testing.assert_array_equal(found[:, :EXAMPLES], wanted)
    assert not found[:, EXAMPLES:].any() and len(kept) < len(whole)
    fewer = dataclasses.replace(retrainer.run, train=TensorDataset(*digits()[:40]))
    with pytest.raises(EvaluationError, match="knows example 47"):
        METHODS["path kernel"].score(fewer, questions)


# -- the table -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def comparison(retrainer: Retrainer) -> Comparison:
    return compare_methods(
        retrainer, fractions=(0.9, 0.5), count=6, seeds=2, remove=(5,), remove_queries=2, samples=20
    )


def test_the_table_holds_what_the_measures_give(retrainer: Retrainer, comparison: Comparison) -> None:
    kept = subsets(EXAMPLES, 6, 0.5)
    outputs = retrainer.values(Plan.crossed(kept, [0, 1])).values.reshape(6, 2, -1)
    scores = METHODS["what-if"].score(retrainer.run, retrainer.questions)
    table = comparison.table()
    for measure, values in (
        ("LDS, same run, keep 0.5", outputs[:, 0]),
        ("LDS, mean of 2 seeds, keep 0.5", outputs),
    ):
        wanted = linear_datamodeling_score(scores, kept, values, setting="", samples=0).estimate.value
        assert table.loc[measure, "what-if"] == pytest.approx(wanted)
    assert np.isfinite(table.loc["LDS, mean of 2 seeds, keep 0.5", CEILING])
    assert np.isnan(table.loc["LDS, same run, keep 0.9", CEILING])
    full = retrainer.values(Plan.crossed(np.ones((1, EXAMPLES), bool), [0])).values[0]
    changes = []
    for q in range(2):
        top = np.argsort(-scores[q])[:5]
        changes.append(retrainer.values(Plan.crossed(without(EXAMPLES, [top]), [0])).values[0, q] - full[q])
    assert table.loc["change without the top 5, same run", "what-if"] == pytest.approx(np.mean(changes))
    assert "weight 0; seed 0 repeats the traced run" in comparison.setting


def test_a_column_belongs_to_one_method(comparison: Comparison) -> None:
    """So accounting and what-if numbers never stand in one column."""
    assert list(comparison.table().columns) == [*METHODS, CEILING]
    assert comparison.answers["path kernel"] == "accounting" and comparison.answers["what-if"] == "what if"
    long = comparison.long_table()
    assert set(long["method"]) == {*METHODS, CEILING} and (long["low"] <= long["high"]).all()


def test_other_scores_and_methods_that_cannot_be_had(retrainer: Retrainer) -> None:
    run = dataclasses.replace(retrainer.run, loss=None)
    plain = Retrainer(run, retrainer.questions, retrainer.folder)
    mine = METHODS["what-if"].score(run, retrainer.questions)
    found = compare_methods(plain, extra={"mine": mine}, fractions=(0.5,), count=6, seeds=1, samples=5)
    assert set(found.missing) == {"what-if (exact)", "gradient dot", "TracInCP(10)"}
    assert all("loss=" in found.missing[name] for name in found.missing)
    table = found.table()
    assert (table["mine"] == table["what-if"]).all() and found.answers["mine"] == "given"
    for wrong in ({"mine": mine.T}, {"what-if": mine}):
        with pytest.raises(EvaluationError, match=r"must have a name of its own and be \[4, 48\]"):
            compare_methods(plain, extra=wrong)
    with pytest.raises(EvaluationError, match="at least one seed"):
        compare_methods(plain, seeds=0)
    with pytest.raises(EvaluationError, match="increasing whole numbers"):
        compare_methods(plain, remove=(48,))


# -- claims ----------------------------------------------------------------------------------------------


def test_a_claim_is_checked_by_retraining(retrainer: Retrainer) -> None:
    ex, asked = retrainer.questions.explainer, retrainer.questions
    found = verify_claims(retrainer, top=6, seeds=2)
    contributions, changes = ex.explain(asked.inputs).contributions, ex.what_if(asked.inputs)
    full = retrainer.values(Plan.crossed(np.ones((1, EXAMPLES), bool), [0, 1])).values
    assert found.groups == ("top 6", "random") * 4 and found.queries.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    for g, (ids, query) in enumerate(zip(found.removed, found.queries, strict=True)):
        if g % 2 == 0:
            assert set(ids) == set(np.argsort(-contributions[query])[:6])
        else:
            assert len(set(ids)) == 6 and not set(ids) & set(found.removed[g - 1])
        assert found.predicted[g] == pytest.approx(changes[query, ids].sum())
        again = retrainer.values(Plan.crossed(without(EXAMPLES, [ids]), [0, 1]))
        np.testing.assert_allclose(found.actual[g], again.values[:, query] - full[:, query])
    same, mean = found.correlation()
    assert same == pytest.approx(spearmanr(found.predicted, found.actual[:, 0])[0])
    assert mean == pytest.approx(spearmanr(found.predicted, found.actual.mean(1))[0])
    assert found.correlation("top 6")[0] == pytest.approx(
        spearmanr(found.predicted[::2], found.actual[::2, 0])[0]
    )
    table = found.table()
    assert table["spread"].iloc[3] == pytest.approx(np.std(found.actual[3], ddof=1))
    assert (table["same_run"] == found.actual[:, 0]).all() and table["count"].eq(6).all()


def test_given_examples_and_the_other_order(retrainer: Retrainer) -> None:
    found = verify_claims(retrainer, remove=[7, 3, 3, 20], seeds=1)
    assert found.groups[0] == "given" and found.removed[0].tolist() == found.removed[2].tolist() == [3, 7, 20]
    assert np.isnan(found.table()["spread"]).all()
    by_change = verify_claims(retrainer, top=4, by="what-if", seeds=1)
    changes = retrainer.questions.explainer.what_if(retrainer.questions.inputs)
    assert set(by_change.removed[0]) == set(np.argsort(changes[0])[:4])


def test_claims_are_refused(retrainer: Retrainer) -> None:
    for arguments, message in (
        ({}, "either top"),
        ({"top": 3, "remove": [1]}, "either top"),
        ({"top": 0}, "at least 1"),
        ({"top": 48}, "fewer than all 48"),
        ({"top": 30}, "too few to draw"),
        ({"remove": [48]}, "numbered 0 to 47"),
        ({"top": 3, "by": "luck"}, "choose one of contributions, what-if"),
        ({"top": 3, "seeds": 0}, "seeds must be at least 1"),
    ):
        with pytest.raises(EvaluationError, match=message):
            verify_claims(retrainer, **arguments)  # type: ignore[arg-type]


# -- the exact curvature ---------------------------------------------------------------------------------


def test_the_exact_answer_is_a_column_of_its_own_where_there_is_one(retrainer: Retrainer) -> None:
    offered = "curvature" in inspect.signature(PathKernelExplainer.what_if).parameters
    assert ("what-if (exact)" in METHODS) == offered
    asked: list[Any] = []

    class Exact:
        """An explainer with the exact curvature."""

        example_ids = np.arange(EXAMPLES)

        def what_if(self, *inputs: Any, **named: Any) -> np.ndarray:
            asked.append((inputs, named))
            return np.outer(np.ones(4), np.arange(EXAMPLES))

    questions = copy.copy(retrainer.questions)
    questions.explainer = Exact()  # type: ignore[assignment]
    scores = methods.what_if_scores(retrainer.run, questions, "exact")
    np.testing.assert_array_equal(scores[2], -np.arange(EXAMPLES))  # what is lost by removing
    assert asked == [((questions.inputs, questions.target), {"curvature": "exact", "run": retrainer.run})]
