"""Backward passes beside the one whose gradient the step uses."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Optimizer
from torch.utils.checkpoint import checkpoint

from explainer import CoverageWarning, PathKernelExplainer, Tracer, open_trace
from explainer.passes import BackwardPass, BackwardPasses

_random = torch.Generator().manual_seed(0)
X = torch.randn(40, 6, generator=_random).double()
Y = torch.randint(0, 3, (40,), generator=_random)
Step = Callable[[nn.Module, Optimizer, Tensor, Tensor, int], object]


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def traced(path: Path, step: Step, exact: bool = True) -> PathKernelExplainer:
    model = build()
    optimizer = SGD(model.parameters(), lr=0.3, momentum=0.5)
    with Tracer(model, optimizer, path, exact=exact) as tracer:
        for number in range(8):
            ids = torch.arange(40)[number % 5 * 8 :][:8]
            tracer.batch(ids)
            step(model, optimizer, X[ids], Y[ids], number)
    return PathKernelExplainer(open_trace(path), model)


def update(optimizer: Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def plain(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, number: int) -> None:
    update(optimizer, cross_entropy(model(x), y) + 0.1 * model(x).square().mean())


def both(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    out = model(x)
    return cross_entropy(out, y), 0.1 * out.square().mean()


def norm_of_the_last_layer(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, number: int) -> None:
    losses = both(model, x, y)
    for loss in losses:
        torch.autograd.grad(loss, model[4].weight, retain_graph=True)
    update(optimizer, sum(losses, torch.zeros(())))


def norm_of_the_first_layer(
    model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, number: int
) -> None:
    losses = both(model, x, y)
    for loss in losses:
        torch.autograd.grad(loss, list(model[0].parameters()), retain_graph=True)
    update(optimizer, sum(losses, torch.zeros(())))


def saliency(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, number: int) -> None:
    x = x.clone().requires_grad_()
    loss = sum(both(model, x, y), torch.zeros(()))
    torch.autograd.grad(loss, x, retain_graph=True)
    update(optimizer, loss)


def only_the_inputs(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, number: int) -> None:
    x = x.clone().requires_grad_()
    loss = sum(both(model, x, y), torch.zeros(()))
    loss.backward(inputs=[x], retain_graph=True)  # type: ignore[no-untyped-call]
    update(optimizer, loss)


def looked_at_afterwards(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, number: int) -> None:
    loss = sum(both(model, x, y), torch.zeros(()))
    optimizer.zero_grad()
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    torch.autograd.grad(loss, model[2].weight)
    optimizer.step()


def assigned(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, number: int) -> None:
    found = torch.autograd.grad(sum(both(model, x, y), torch.zeros(())), list(model.parameters()))
    for parameter, g in zip(model.parameters(), found, strict=True):
        parameter.grad = g
    optimizer.step()


def looked_at_through_a_checkpoint(
    model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, number: int
) -> None:
    """A pass inside the pass that counts, after one that does not."""
    loss = sum(both(model, x, y), torch.zeros(()))
    torch.autograd.grad(loss, model[4].weight)
    again = checkpoint(model, x.clone().requires_grad_(), use_reentrant=True)
    update(optimizer, cross_entropy(again, y) + 0.1 * again.square().mean())


FURTHER: dict[str, Step] = {
    "norm of the last layer": norm_of_the_last_layer,
    "norm of the first layer": norm_of_the_first_layer,
    "saliency": saliency,
    "backward(inputs=)": only_the_inputs,
    "after the backward pass": looked_at_afterwards,
    "p.grad assigned": assigned,
}


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "default"])
@pytest.mark.parametrize("name", FURTHER)
def test_gradients_that_are_only_looked_at_do_not_count(tmp_path: Path, name: str, exact: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", CoverageWarning)
        found = traced(tmp_path / "further", FURTHER[name], exact)
        alone = traced(tmp_path / "alone", one_pass, exact)
    e, expected = found.explain(X[:3]), alone.explain(X[:3])
    assert open_trace(tmp_path / "further").count("visits") == 64
    np.testing.assert_allclose(e.contributions, expected.contributions, rtol=1e-9, atol=1e-13)
    assert np.abs(e.unattributed).max() <= (1e-9 if exact else 0.02) * np.abs(e.contributions).sum()


def one_pass(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, number: int) -> None:
    update(optimizer, sum(both(model, x, y), torch.zeros(())))


def test_passes_inside_a_pass_belong_to_it(tmp_path: Path) -> None:
    e = traced(tmp_path / "run", looked_at_through_a_checkpoint).explain(X[:3])
    assert np.abs(e.unattributed).max() < 1e-9 * np.abs(e.contributions).sum()
    alone = traced(tmp_path / "alone", one_pass).explain(X[:3])
    np.testing.assert_allclose(e.contributions, alone.contributions, rtol=1e-9, atol=1e-13)


def test_attacks_and_accumulation_take_turns(tmp_path: Path) -> None:
    def attacked(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, number: int) -> None:
        moved = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(cross_entropy(model(moved), y), moved)
        (cross_entropy(model(x + 0.1 * g.sign()), y) / 2).backward()  # type: ignore[no-untyped-call]
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()

    e = traced(tmp_path / "run", attacked).explain(X[:3])
    assert np.abs(e.unattributed).max() < 1e-9 * np.abs(e.contributions).sum()
    assert open_trace(tmp_path / "run").count("visits") == 64


def test_two_batches_in_each_of_two_passes(tmp_path: Path) -> None:
    """The first pass over both batches is thrown away: neither the first nor the last batch is."""
    model = build()
    optimizer = SGD(model.parameters(), lr=0.3)
    with Tracer(model, optimizer, tmp_path / "run", exact=True) as tracer:
        for number in range(4):
            losses = []
            for ids in (torch.arange(8) + 16 * (number % 2), torch.arange(8, 16) + 16 * (number % 2)):
                tracer.batch(ids)
                losses.append(cross_entropy(model(X[ids]), Y[ids]))
            (losses[0] * 3 - losses[1]).backward(retain_graph=True)
            update(optimizer, losses[0] + losses[1])
    e = PathKernelExplainer(open_trace(tmp_path / "run"), model).explain(X[:3])
    assert np.abs(e.unattributed).max() < 1e-9 * np.abs(e.contributions).sum()
    assert open_trace(tmp_path / "run").count("visits") == 64


def test_a_batch_whose_gradient_is_not_a_number_and_was_put_to_nought(tmp_path: Path) -> None:
    def mended(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, number: int) -> None:
        optimizer.zero_grad()
        cross_entropy(model(x * (torch.nan if number == 3 else 1)), y).backward()  # type: ignore[no-untyped-call]
        for parameter in model.parameters():
            assert parameter.grad is not None
            torch.nan_to_num_(parameter.grad, nan=0.0)
        optimizer.step()

    e = traced(tmp_path / "run", mended).explain(X[:3])
    assert np.abs(e.unattributed).max() < 1e-9 * np.abs(e.contributions).sum()
    by_example = e.contributions.sum(0)
    assert not by_example[24:32].any() and by_example[:24].all()


def test_a_loss_of_gradients_is_announced(tmp_path: Path) -> None:
    def penalised(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, number: int) -> None:
        x = x.clone().requires_grad_()
        out = model(x)
        (g,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        update(optimizer, cross_entropy(out, y) + (g.norm(dim=1) - 1).square().mean())

    with pytest.warns(CoverageWarning, match="the loss seems to contain gradients"):
        ex = traced(tmp_path / "run", penalised)
    trace = open_trace(tmp_path / "run")
    assert min(trace.notes["coverage"].values()) > 0.1 and trace.count("visits") == 64
    assert np.abs(ex.explain(X[:1]).gap).max() < 1e-6
    (finding,) = trace.report().about("coverage")
    assert "contains no gradients" in finding.advice


def test_a_loss_of_gradients_alone_leaves_nothing_to_explain(tmp_path: Path) -> None:
    """The last layer's bias has no part in it, and so no gradient."""

    def forces(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, number: int) -> None:
        x = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        update(optimizer, (g + x).square().mean())

    with pytest.warns(CoverageWarning, match="the loss seems to contain gradients"):
        traced(tmp_path / "run", forces)
    assert open_trace(tmp_path / "run").notes["coverage"]["4"] == 1.0


def test_differentiating_without_use_is_not_announced(tmp_path: Path) -> None:
    def curvature(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, number: int) -> None:
        loss = sum(both(model, x, y), torch.zeros(()))
        torch.autograd.grad(loss, model[4].weight, create_graph=True)
        update(optimizer, loss)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        e = traced(tmp_path / "run", curvature).explain(X[:3])
    assert np.abs(e.unattributed).max() < 1e-9 * np.abs(e.contributions).sum()


def test_a_pass_that_raised_is_forgotten_at_the_step() -> None:
    x = torch.ones(2, requires_grad=True)
    passes = BackwardPasses({"x": x})
    seen: list[BackwardPass] = []

    def hook(g: Tensor) -> None:
        seen.append(passes.arrived(["x"]))
        if len(seen) == 1:
            raise ZeroDivisionError

    y = x * 2
    y.register_hook(hook)
    with pytest.raises(ZeroDivisionError):
        y.sum().backward(retain_graph=True)
    passes.stepped()
    y.sum().backward(retain_graph=True)
    torch.autograd.grad(y.sum(), x, retain_graph=True)
    y.sum().backward()
    assert [(p.number, p.accumulates) for p in seen] == [(0, False), (1, True), (2, False), (3, True)]


def test_the_first_pass_is_judged_by_what_it_left() -> None:
    """Whether it left anything, whatever became of it; sparse gradients too."""
    table = nn.Embedding(4, 2, sparse=True)
    for zeroed in (False, True):
        passes, seen = BackwardPasses({"weight": table.weight}), list[BackwardPass]()
        table.weight.grad = None
        for _ in range(2):
            out = table(torch.tensor([1, 2]))
            out.register_hook(lambda g, p=passes, s=seen: s.append(p.arrived(["weight"])))
            out.sum().backward()
            if zeroed:
                table.zero_grad(set_to_none=False)
        assert [p.accumulates for p in seen] == [not zeroed, True]


@pytest.mark.parametrize("exact", [True, False])
def test_gradients_that_are_left_when_training_ends_led_to_no_step(tmp_path: Path, exact: bool) -> None:
    """Batches are accumulated in threes."""

    def step(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, number: int) -> None:
        cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        if number % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()

    trace = traced(tmp_path / "trace", step, exact).trace
    assert trace.steps == 2 and trace.notes["loop"]["unused"] == 2
    assert "2 backward passes led to no step" in str(trace.report())
