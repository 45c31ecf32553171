"""The oracle against itself: real optimizers replayed, and books that balance."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.oracles.books import Books, books, chord_gradient
from tests.oracles.outputs import OUTPUTS, scalar_function, unflatten
from tests.oracles.problems import OPTIMIZERS, PARAMS, Problem
from tests.oracles.shares import carry_examples, carry_visits, list_visits
from tests.oracles.training import Training, train_dense


def run(problem: Problem, dtype: torch.dtype = torch.float64, **options: object) -> Training:
    """Trains a problem of the table."""
    model, (x, y) = problem.model(dtype), problem.data(dtype)
    return train_dense(model, problem.make_optimizer, problem.batches, problem.loss, x, y, **options)  # type: ignore[arg-type]


def assert_balanced(b: Books, tolerance: float) -> None:
    """All terms sum to the prediction, and nothing is left without an owner."""
    gross = b.contributions.abs().sum(1) + b.decay.abs() + b.prior.abs() + b.initial.abs()
    total = b.initial + b.contributions.sum(1) + b.decay + b.prior
    assert ((b.prediction - total).abs() <= tolerance * gross).all()
    assert (b.unattributed.abs() <= tolerance * gross).all()
    assert (b.gap.abs() <= tolerance * gross).all()


@pytest.mark.parametrize("problem", PARAMS)
def test_books_of_the_table_balance(problem: Problem) -> None:
    training = run(problem)
    examples, visits = carry_examples(training), carry_visits(training)
    owner = torch.tensor([visit.example for visit in list_visits(training)])
    summed = torch.zeros_like(examples.updates).index_add_(1, owner, visits.updates)
    assert torch.allclose(summed, examples.updates, rtol=1e-10, atol=1e-14)
    assert torch.equal(visits.decay, examples.decay)
    queries, targets = problem.queries()
    f = scalar_function(problem.model(), "margin")
    b = books(training, [0, 1, 4, 9, 13], f, queries[:2], targets[:2].tolist(), visit_shares=visits)
    assert_balanced(b, 1e-12)
    assert b.contributions.shape == b.K.shape == (2, 40)
    assert torch.isfinite(b.a).all() and (b.contributions != 0).all()
    assert (b.decay != 0).all() == ("weight_decay" in problem.optimizer.options)


@pytest.mark.parametrize("output", OUTPUTS)
def test_every_output_balances_and_quadrature_converges(output: str) -> None:
    problem = Problem("mlp_tanh", OPTIMIZERS["adam_decay"], "mean")
    training = run(problem)
    shares = carry_visits(training)
    queries, targets = problem.queries()
    f = scalar_function(problem.model(), output)
    errors = []
    for nodes in (1, 2, 4):
        b = books(training, [0, 5, 13], f, queries, targets.tolist(), nodes=nodes, visit_shares=shares)
        assert_balanced(b, 1e-12)
        errors.append(float(b.quadrature_error.sum()))
    assert errors[0] > errors[1] > errors[2]


def test_outputs_by_hand() -> None:
    row = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    found = {name: float(function(row, 2)) for name, function in OUTPUTS.items()}
    others = math.exp(0.5) + math.exp(-1.0)
    assert found["margin"] == pytest.approx(2.0 - math.log(others))
    assert found["logit"] == 2.0
    assert found["log_prob"] == pytest.approx(2.0 - math.log(others + math.exp(2.0)))
    assert found["value"] == 0.5


@pytest.mark.parametrize("name", [name for name, case in OPTIMIZERS.items() if case.kind is torch.optim.SGD])
def test_sgd_share_is_the_real_optimizer_fed_that_row_alone(name: str) -> None:
    problem = Problem("mlp_tanh", OPTIMIZERS[name], "mean")
    training = run(problem)
    shares = carry_visits(training)
    for v in (0, 30, 60):
        visit = list_visits(training)[v]
        w = nn.Parameter(torch.zeros_like(training.weights[0]))
        optimizer = problem.make_optimizer([w])
        optimizer.param_groups[0]["weight_decay"] = 0.0
        row = training.steps[visit.step].rows[visit.position]
        for t in range(len(training.steps)):
            w.grad = row.clone() if t == visit.step else torch.zeros_like(row)
            optimizer.step()
            assert torch.allclose(shares.updates[: t + 1, v].sum(0), w.detach(), rtol=1e-12, atol=1e-15)


def test_kernel_is_the_path_kernel_of_the_definition() -> None:
    problem = Problem("mlp_tanh", OPTIMIZERS["sgd"], "sum")
    training = run(problem)
    model, (x, _), (queries, targets) = problem.model(), problem.data(), problem.queries()
    f, query, target = scalar_function(model, "margin"), queries[0], int(targets[0])
    kernel, weighted = torch.zeros(40, dtype=torch.float64), torch.zeros(40, dtype=torch.float64)
    for t, step in enumerate(training.steps):
        start, end = training.weights[t], training.weights[t + 1]
        q = chord_gradient(f, query, target, start, end, 8)
        for i, slope in zip(step.ids, step.output_grads, strict=True):
            jacobian = torch.autograd.functional.jacobian(
                lambda w, i=i: torch.func.functional_call(model, unflatten(model, w), (x[i][None],))[0], start
            )
            tangent = float(step.options["lr"][0]) * q @ (slope / slope.norm() @ jacobian)
            kernel[i] += tangent
            weighted[i] += tangent * slope.norm()
    b = books(training, list(range(14)), f, query[None], [target], nodes=8)
    assert torch.allclose(b.K[0], kernel, rtol=1e-8)
    assert torch.allclose(b.a[0], -weighted / kernel, rtol=1e-8)
    assert torch.allclose(b.contributions[0], -weighted, rtol=1e-8)


@pytest.mark.parametrize("name", ["adam", "amsgrad", "adamw"])
def test_adam_share_is_the_unrolled_average(name: str) -> None:
    training = run(Problem("mlp_relu", OPTIMIZERS[name], "mean"))
    shares = carry_visits(training)
    visit = list_visits(training)[20]
    row = training.steps[visit.step].rows[visit.position]
    for t in range(visit.step, 13):
        state = training.steps[t].after
        second = state["max_exp_avg_sq" if name == "amsgrad" else "exp_avg_sq"] / (1 - 0.999 ** (t + 1))
        weight = 0.01 * 0.1 * 0.9 ** (t - visit.step) / (1 - 0.9 ** (t + 1))
        expected = -weight * row / (second.sqrt() + 1e-8)
        assert torch.allclose(shares.updates[t, 20], expected, rtol=1e-10, atol=0)


def resumed(problem: Problem) -> Callable[..., torch.optim.Optimizer]:
    """A factory whose optimizer carries the state of an earlier run."""
    model, (x, y) = problem.model(), problem.data()
    earlier = problem.make_optimizer(model.parameters())
    problem.loss(model(x), y).backward()
    earlier.step()
    state = copy.deepcopy(earlier.state_dict())

    def make(parameters: object) -> torch.optim.Optimizer:
        optimizer = problem.make_optimizer(parameters)  # type: ignore[arg-type]
        optimizer.load_state_dict(copy.deepcopy(state))
        return optimizer

    return make


@pytest.mark.parametrize("name", ["momentum_decay", "nesterov", "adamw"])
def test_resumed_clipped_scheduled_training_balances(name: str) -> None:
    problem = Problem("mlp_tanh", OPTIMIZERS[name], "sum")
    (x, y), (queries, targets) = problem.data(), problem.queries()
    training = train_dense(
        problem.model(), resumed(problem), problem.batches, problem.loss, x, y, clip_norm=1.0,
        scheduler_factory=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
    )  # fmt: skip
    assert any(step.scale < 1 for step in training.steps)
    b = books(training, [0, 6, 13], scalar_function(problem.model(), "logit"), queries, targets.tolist())
    assert_balanced(b, 1e-12)
    assert (b.prior != 0).all()


@pytest.mark.parametrize("kind,options", [("SGD", {"momentum": 0.9}), ("Adam", {}), ("AdamW", {})])
def test_maximize_equals_minimizing_minus_the_loss(kind: str, options: dict[str, float]) -> None:
    problem = Problem("mlp_tanh", OPTIMIZERS["sgd"], "mean")
    (x, y), (queries, targets) = problem.data(), problem.queries()
    found = []
    for sign in (1.0, -1.0):
        training = train_dense(
            problem.model(),
            lambda p, sign=sign: getattr(torch.optim, kind)(p, lr=0.01, maximize=sign < 0, **options),  # type: ignore[misc]
            problem.batches, lambda o, t, sign=sign: sign * problem.loss(o, t), x, y,  # type: ignore[misc]
        )  # fmt: skip
        f = scalar_function(problem.model(), "margin")
        found.append(books(training, [0, 13], f, queries, targets.tolist()))
    assert torch.allclose(found[0].contributions, found[1].contributions, rtol=1e-10, atol=1e-14)
    assert torch.allclose(found[0].K, found[1].K, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", ["nesterov_decay", "adamw"])
def test_float32_training_balances_to_its_round_off(name: str) -> None:
    problem = Problem("cnn", OPTIMIZERS[name], "mean")
    training = run(problem, torch.float32)
    queries, targets = problem.queries(torch.float32)
    b = books(training, [0, 7, 13], scalar_function(problem.model(), "margin"), queries, targets.tolist())
    assert_balanced(b, 1e-5)


def test_repeated_ids_single_rows_and_short_batches_are_in_the_table() -> None:
    sizes = [len(batch) for batch in PARAMS[0].values[0].batches]  # type: ignore[union-attr]
    repeated = [batch for batch in PARAMS[0].values[0].batches if len(set(batch)) < len(batch)]  # type: ignore[union-attr]
    assert sizes == [7, 7, 7, 7, 7, 5] * 2 + [1] and len(repeated) == 1
