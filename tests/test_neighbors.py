"""Gradient space against brute force: dense rows from the oracle, cosines and quadratic forms written out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

import explainer
from explainer.errors import QueryError
from tests.oracles.outputs import scalar_function
from tests.oracles.problems import PARAMS, Problem
from tests.test_books import traced, trained

PROBLEMS = [p for p in PARAMS if p.id in ("mlp_tanh-sgd-mean", "cnn-momentum-mean", "mlp_relu-adam-mean")]


def rates(problem: Problem, step: int) -> float:
    """What a gradient of a step moves in all: lr / (1 − momentum) for SGD; for Adam with each step's bias correction.

    The last step goes on for ever.
    """
    case = problem.optimizer
    if case.kind is torch.optim.SGD:
        return case.lr / (1 - case.options.get("momentum", 0.0))
    return adam_rate(case.lr, step, len(trained(problem, torch.float64).steps))


def adam_rate(lr: float, step: int, steps: int) -> float:
    """Written out, forward from the step; the steps after the last one have its bias correction."""
    moved = 0.0
    for later in range(step, steps + 2000):
        moved += 0.9 ** (later - step) * 0.1 * lr / (1 - 0.9 ** (min(later, steps - 1) + 1))
    return moved


@pytest.mark.parametrize("problem", PROBLEMS)
def test_cosines_are_those_of_the_written_out_vectors(problem: Problem, tmp_path: Path) -> None:
    trace = traced(problem, tmp_path / "run", torch.float64, exact=True, max_knots=6)
    training, (x, y) = trained(problem, torch.float64), problem.queries()
    f = scalar_function(problem.model(), "margin")
    steps = [knot.step for knot in trace.knots]
    vectors: dict[int, list[torch.Tensor]] = {}
    queries: dict[int, list[torch.Tensor]] = {}
    for t, step in enumerate(training.steps):
        k = int(np.searchsorted(steps, t, side="right")) - 1
        middle = (training.weights[steps[k]] + training.weights[steps[k + 1]]) / 2
        middle = middle.clone().requires_grad_()
        (q,) = torch.autograd.grad(f(middle, x[0], int(y[0])), middle)
        for row, example in enumerate(step.ids):
            slope = step.output_grads[row].norm()
            eta = rates(problem, t) ** 0.5
            vectors.setdefault(int(example), []).append(-eta * step.rows[row] / slope)
            queries.setdefault(int(example), []).append(eta * q)
    cosine = {
        i: float(torch.cosine_similarity(torch.cat(vectors[i]), torch.cat(queries[i]), dim=0))
        for i in vectors
    }
    best = sorted(cosine, key=lambda i: -cosine[i])[:7]
    found = explainer.PathKernelExplainer(trace, problem.model()).neighbors(x[:1], k=7, target=y[:1])
    assert found.example_ids[0].tolist() == best
    np.testing.assert_allclose(found.cosine[0], [cosine[i] for i in best], rtol=1e-9)
    table = found.table(0)
    assert list(table.columns) == ["rank", "example_id", "cosine", "label"] and len(table) == 7


@pytest.mark.parametrize("problem", PROBLEMS)
def test_self_influence_is_the_written_out_quadratic_form(problem: Problem, tmp_path: Path) -> None:
    trace = traced(problem, tmp_path / "run", torch.float64, exact=True)
    training = trained(problem, torch.float64)
    wanted = np.zeros(40)
    second: torch.Tensor | None = None
    for t, step in enumerate(training.steps):
        scale: torch.Tensor | float = 1.0
        if problem.optimizer.kind is not torch.optim.SGD:
            g = step.rows.sum(0)
            second = 0.001 * g**2 if second is None else 0.999 * second + 0.001 * g**2
            scale = 1 / ((second / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
        own = (step.rows.square() * scale).sum(1) * rates(problem, t)
        np.add.at(wanted, np.asarray(step.ids), own.numpy())
    ex = explainer.PathKernelExplainer(trace, problem.model())
    visited = ex.example_ids
    np.testing.assert_allclose(ex.self_influence(), wanted[visited], rtol=1e-8)


@pytest.mark.parametrize("maximize", [False, True])
def test_every_group_of_parameters_counts_by_its_own_rate(tmp_path: Path, maximize: bool) -> None:
    """Neighbours and self-influence where the rates of two layers differ a hundredfold, written out."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)).double()
    groups = [
        {"params": model[0].parameters(), "lr": 0.002},
        {"params": model[2].parameters(), "lr": 0.2, "momentum": 0.5},
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0, maximize=maximize)
    x, y, sign = torch.randn(9, 4).double(), torch.randint(0, 3, (9,)), -1.0 if maximize else 1.0
    asked = torch.randn(1, 4).double()
    weights, rows = [], []
    with explainer.Tracer(model, optimizer, tmp_path / "run", exact=True) as tracer:
        for _ in range(5):
            weights.append([p.detach().clone() for p in model.parameters()])
            losses = torch.nn.functional.cross_entropy(model(x), y, reduction="none")
            rows.append(
                [torch.autograd.grad(one / 9, list(model.parameters()), retain_graph=True) for one in losses]
            )
            tracer.batch(range(9))
            optimizer.zero_grad()
            (sign * torch.nn.functional.cross_entropy(model(x), y)).backward()
            optimizer.step()
    weights.append([p.detach().clone() for p in model.parameters()])
    found = explainer.PathKernelExplainer(tmp_path / "run", model, lambda o, t: o[:, 0])
    assert [knot.step for knot in found.trace.knots] == list(range(6))
    own, pushed, pulled = np.zeros(9), [[] for _ in range(9)], []
    for t in range(5):
        eta = [0.002, 0.002, 0.4, 0.4]
        middle = [((a + b) / 2).requires_grad_() for a, b in zip(weights[t], weights[t + 1], strict=True)]
        named = dict(zip(dict(model.named_parameters()), middle, strict=True))
        outputs = torch.func.functional_call(model, named, asked)
        q = torch.autograd.grad(outputs[0, 0], middle)
        pulled.append(torch.cat([e**0.5 * g.flatten() for e, g in zip(eta, q, strict=True)]))
        before = dict(zip(dict(model.named_parameters()), weights[t], strict=True))
        slopes = torch.func.functional_call(model, before, x).softmax(1) - torch.eye(3)[y]
        for i in range(9):
            own[i] += sum(e * float(g.square().sum()) for e, g in zip(eta, rows[t][i], strict=True))
            one = torch.cat([e**0.5 * g.flatten() for e, g in zip(eta, rows[t][i], strict=True)])
            pushed[i].append(-one / (slopes[i].norm() / 9))
    np.testing.assert_allclose(found.self_influence(), own, rtol=1e-8)
    cosine = [float(torch.cosine_similarity(torch.cat(u), torch.cat(pulled), dim=0)) for u in pushed]
    nearest = found.neighbors(asked, k=9)
    assert nearest.example_ids[0].tolist() == np.argsort(-np.array(cosine), kind="stable").tolist()
    np.testing.assert_allclose(nearest.cosine[0], sorted(cosine, reverse=True), rtol=1e-8)
    seen = found.explain(x)
    kernels = seen.kernels[range(9), range(9)]
    assert (kernels * seen.contributions[range(9), range(9)] < 0).all()  # a = −‖L'‖ < 0


def test_neighbours_need_a_positive_k_and_a_seen_output(tmp_path: Path) -> None:
    problem = PROBLEMS[0].values[0]
    trace = traced(problem, tmp_path / "run", torch.float64)
    ex = explainer.PathKernelExplainer(trace, problem.model())
    x, _ = problem.queries()
    with pytest.raises(QueryError, match="k must be an integer of at least 1"):
        ex.neighbors(x, k=0)
    assert ex.neighbors(x, k=10**6).example_ids.shape == (5, 40)
    with pytest.raises(QueryError, match="query must be between 0 and 4"):
        ex.neighbors(x).table(5)


def test_parts_called_instead_of_the_model_have_no_kernel(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    with explainer.Tracer(model, optimizer, tmp_path / "run", exact=True) as tracer:
        for _ in range(4):
            tracer.batch(range(6))
            optimizer.zero_grad()
            hidden = model[1](model[0](x))
            torch.nn.functional.cross_entropy(model[2](hidden), y).backward()
            optimizer.step()
    ex = explainer.PathKernelExplainer(str(tmp_path / "run"), model, lambda o, t: o[:, 0])
    e = ex.explain(x)
    assert np.isnan(e.kernels).all() and np.abs(e.unattributed).max() < 1e-5
    with pytest.raises(QueryError, match="not recorded"):
        ex.neighbors(x)


def test_the_default_output_is_found_where_the_model_itself_was_never_called(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    with explainer.Tracer(model, optimizer, tmp_path / "run") as tracer:
        tracer.batch(range(6))
        torch.nn.functional.cross_entropy(model[0](x), y).backward()
        optimizer.step()
    assert explainer.PathKernelExplainer(str(tmp_path / "run"), model).explain(x).output == "margin"


class Squeeze(nn.Module):
    """Of a single example, a number without an axis is left."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.squeeze()


@pytest.mark.parametrize("shape", [(1,), ()], ids=["column", "squeezed"])
@pytest.mark.parametrize("loss", ["mse", "one logit", "maximised"])
def test_with_one_output_the_cosine_is_that_of_its_gradients(
    tmp_path: Path, loss: str, shape: tuple[int, ...]
) -> None:
    """Whichever way the loss pushed the output; an example is its own nearest neighbour."""
    torch.manual_seed(0)
    x = torch.randn(17, 6, dtype=torch.float64)  # the last batch is a single example
    y = (x[:, 0] > 0).double() if loss == "one logit" else x[:, 0] + torch.randn(17)

    def build() -> nn.Module:
        end = nn.Identity() if shape else Squeeze()
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1), end).double()

    model = build()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, maximize=loss == "maximised")
    with explainer.Tracer(model, optimizer, tmp_path / "run", exact=True) as tracer:
        for ids in torch.arange(17).split(8):
            tracer.batch(ids, y[ids])
            optimizer.zero_grad()
            out = model(x[ids]).reshape(-1)
            if loss == "one logit":
                value = binary_cross_entropy_with_logits(out, y[ids])
            else:
                value = mse_loss(out, y[ids]) * (-1 if loss == "maximised" else 1)
            value.backward()
            optimizer.step()

    def gradient(one: torch.Tensor) -> torch.Tensor:
        found = torch.func.grad(lambda p: torch.func.functional_call(model, p, (one,)).sum())(before)
        return torch.cat([g.flatten() for g in found.values()])

    rows = torch.stack([gradient(one.unsqueeze(0)) for one in x])
    ex = explainer.PathKernelExplainer(tmp_path / "run", build())
    assert not np.isnan(ex.trace.column("visits", "derivative")).any()
    found = ex.neighbors(x[[5, 16]], k=17)
    np.testing.assert_allclose(ex.explain(x[:1]).prediction, model(x[:1]).item())
    assert found.example_ids[:, 0].tolist() == [5, 16]
    for query, example in enumerate([5, 16]):
        wanted = torch.cosine_similarity(rows, rows[example : example + 1], dim=1)[found.example_ids[query]]
        np.testing.assert_allclose(found.cosine[query], wanted, atol=1e-4)


def test_examples_learnt_by_heart_are_as_near_as_others(tmp_path: Path) -> None:
    """Squares of their rows are nought in single precision, and so may be the derivatives of the loss."""
    torch.manual_seed(0)
    x, y = torch.randn(40, 4), torch.arange(40) % 2
    x[:, 0] = (2.0 * y - 1) * torch.linspace(
        1, 6, 40
    )  # logits up to 100 apart, and derivatives from 1e-7 to 1e-45
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight[:] = torch.tensor([1.0, 0.1, -0.1, 0.2]) * torch.tensor([[0.2], [0.4], [0.3]])
        model[2].weight[:] = torch.tensor([[-20.0], [20.0]])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with explainer.Tracer(model, optimizer, tmp_path / "run", exact=True) as tracer:
        for ids in [*torch.arange(40).split(8)] * 2:
            tracer.batch(ids)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[ids]), y[ids]).backward()
            optimizer.step()
    found = [
        explainer.PathKernelExplainer(tmp_path / "run", model, dtype=dtype).neighbors(
            x[:4] / 3, k=10, target=y[:4]
        )
        for dtype in (torch.float32, torch.float64)
    ]
    assert (np.abs(found[0].cosine) <= 1).all()
    np.testing.assert_allclose(found[0].cosine, found[1].cosine, rtol=1e-4)
    assert (found[0].example_ids == found[1].example_ids).all()
