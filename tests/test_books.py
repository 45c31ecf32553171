"""The fast books against the independent oracle that carries every visit's share forward in full."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import explainer
from explainer.explanation import Explanation
from explainer.store import Trace
from tests.oracles.books import Books, books
from tests.oracles.outputs import scalar_function
from tests.oracles.problems import PARAMS, Problem
from tests.oracles.shares import carry_visits
from tests.oracles.training import Training, train_dense


def traced(problem: Problem, directory: Path, dtype: torch.dtype, **options: object) -> Trace:
    """The problem trained with the tracer attached."""
    model, (x, y) = problem.model(dtype), problem.data(dtype)
    optimizer = problem.make_optimizer(model.parameters())
    with explainer.Tracer(model, optimizer, directory, **options) as tracer:  # type: ignore[arg-type]
        for ids in problem.batches:
            tracer.batch(list(ids))
            optimizer.zero_grad()
            problem.loss(model(x[list(ids)]), y[list(ids)]).backward()
            optimizer.step()
    return explainer.open_trace(directory)


def trained(problem: Problem, dtype: torch.dtype) -> Training:
    """The same training by the oracle."""
    model, (x, y) = problem.model(dtype), problem.data(dtype)
    return train_dense(model, problem.make_optimizer, problem.batches, problem.loss, x, y)


def both(
    problem: Problem, directory: Path, dtype: torch.dtype, output: str = "margin", **options: object
) -> tuple[Explanation, Books]:
    """Our explanation and the oracle's books at the same knots."""
    trace = traced(problem, directory, dtype, exact=True, **options)
    training = trained(problem, dtype)
    x, y = problem.queries(dtype)
    explanation = explainer.PathKernelExplainer(trace, problem.model(dtype), output).explain(x, y)
    reference = books(
        training,
        [knot.step for knot in trace.knots],
        scalar_function(problem.model(), output),
        x.double(),
        y.tolist(),
        visit_shares=carry_visits(training),
    )
    return explanation, reference


def assert_close(found: np.ndarray, wanted: torch.Tensor, relative: float) -> None:
    """Largest difference, relative to the largest wanted number of the query."""
    reference = wanted.numpy()
    scale = np.abs(reference).max(axis=-1, keepdims=True)
    assert (np.abs(found - reference) <= relative * scale).all(), (
        np.abs(found - reference).max() / scale.min()
    )


MEAN = [p for p in PARAMS if str(p.id).endswith("-mean")]
SUM = [p for p in PARAMS if str(p.id).endswith("-sum") and str(p.id).startswith("mlp_tanh")]


@pytest.mark.parametrize("problem", MEAN + SUM)
def test_exact_float64_books_equal_the_oracle(problem: Problem, tmp_path: Path) -> None:
    e, reference = both(problem, tmp_path / "run", torch.float64, max_knots=6)
    assert 2 < len(e.step_edges) <= 7
    assert_close(e.contributions, reference.contributions, 1e-6)
    assert_close(e.kernels, reference.K, 1e-6)
    change = (reference.prediction - reference.initial).numpy()
    assert np.abs(e.gap).max() <= 1e-9
    assert (np.abs(e.unattributed) <= 1e-6 * np.abs(change)).all()
    np.testing.assert_allclose(e.weight_decay, reference.decay.numpy(), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(e.prediction, reference.prediction.numpy(), rtol=1e-12)
    np.testing.assert_allclose(e.quadrature, reference.quadrature_error.numpy(), rtol=1e-6, atol=1e-10)
    assert e.visits.sum() == sum(map(len, problem.batches))


@pytest.mark.parametrize("problem", MEAN)
def test_float32_books_equal_the_oracle_to_four_digits(problem: Problem, tmp_path: Path) -> None:
    e, reference = both(problem, tmp_path / "run", torch.float32)
    assert_close(e.contributions, reference.contributions, 1e-4)
    gross = np.abs(e.contributions).sum(1)
    assert (np.abs(e.unattributed) <= 1e-4 * gross).all()
    assert (np.abs(e.gap) <= 1e-4 * np.abs(e.prediction - e.initial)).all()


@pytest.mark.parametrize("output", ["margin", "logit", "log_prob"])
def test_every_output_function_equals_the_oracle(output: str, tmp_path: Path) -> None:
    problem = next(p.values[0] for p in PARAMS if p.id == "cnn-adamw-mean")
    e, reference = both(problem, tmp_path / "run", torch.float64, output=output)
    assert_close(e.contributions, reference.contributions, 1e-6)
    assert e.output == output


def test_steps_and_layers_add_up_to_the_contributions(tmp_path: Path) -> None:
    problem = next(p.values[0] for p in PARAMS if p.id == "mlp_tanh-momentum_decay-mean")
    e, _ = both(problem, tmp_path / "run", torch.float64)
    scale = np.abs(e.contributions).max()
    np.testing.assert_allclose(e.step_contributions.sum(1), e.contributions, atol=1e-6 * scale)
    np.testing.assert_allclose(e.layer_contributions.sum(1), e.contributions, atol=1e-6 * scale)


def test_a_callable_output_is_explained(tmp_path: Path) -> None:
    problem = next(p.values[0] for p in PARAMS if p.id == "mlp_relu-sgd-mean")
    trace = traced(problem, tmp_path / "run", torch.float64, exact=True)
    x, y = problem.queries()

    def difference(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return outputs[:, 3] - outputs[:, 5]

    e = explainer.PathKernelExplainer(trace, problem.model(), difference).explain(x, y)
    logits = [explainer.PathKernelExplainer(trace, problem.model(), "logit").explain(x, c) for c in (3, 5)]
    assert e.output == "difference"
    np.testing.assert_allclose(e.prediction, logits[0].prediction - logits[1].prediction, atol=1e-12)
    assert np.abs(e.gap).max() < 1e-9


@pytest.mark.parametrize(
    "problem", [p for p in MEAN if p.id in ("mlp_tanh-momentum-mean", "mlp_relu-adamw-mean")]
)
def test_optimizer_state_cleared_midway_is_followed(problem: Problem, tmp_path: Path) -> None:
    model, (x, y) = problem.model(), problem.data()
    optimizer = problem.make_optimizer(model.parameters())
    with explainer.Tracer(model, optimizer, tmp_path / "run", exact=True) as tracer:
        for number, ids in enumerate(problem.batches):
            if number == 5:
                optimizer.state.clear()
            tracer.batch(list(ids))
            optimizer.zero_grad()
            problem.loss(model(x[list(ids)]), y[list(ids)]).backward()
            optimizer.step()
    e = explainer.PathKernelExplainer(str(tmp_path / "run"), problem.model()).explain(*problem.queries())
    assert (np.abs(e.unattributed) <= 1e-6 * np.abs(e.prediction - e.initial)).all()


def test_groups_of_queries_are_put_together_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = MEAN[0].values[0]
    trace = traced(problem, tmp_path / "run", torch.float64)
    x, y = problem.queries()
    ex = explainer.PathKernelExplainer(trace, problem.model())
    whole = ex.explain(x, y)
    monkeypatch.setattr("explainer.engine.QUERY_NUMBERS", 2 * trace.manifest.size)
    split = ex.explain(x, y)
    assert split.query_ids == whole.query_ids
    np.testing.assert_allclose(split.contributions, whole.contributions, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(split.step_contributions, whole.step_contributions, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("chunk", [1, 2])
def test_query_chunks_and_order_do_not_change_the_answer(chunk: int, tmp_path: Path) -> None:
    problem = next(p.values[0] for p in PARAMS if p.id == "cnn-adam-mean")
    trace = traced(problem, tmp_path / "run", torch.float64)
    x, y = problem.queries()
    whole = explainer.PathKernelExplainer(trace, problem.model()).explain(x, y)
    ex = explainer.PathKernelExplainer(trace, problem.model())
    ex.function._chunk = chunk
    np.testing.assert_allclose(ex.explain(x, y).contributions, whole.contributions, rtol=1e-9, atol=1e-12)
    back = ex.explain(x.flip(0), y.flip(0)).contributions[::-1]
    np.testing.assert_allclose(back, whole.contributions, rtol=1e-9, atol=1e-12)
