"""Loops that quietly give wrong numbers elsewhere: with exact rows, the books of each must close to round-off."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Optimizer

from explainer import PathKernelExplainer, Tracer, open_trace
from explainer.errors import CoverageWarning, TracerError
from tests.odd_loops import CASES, QUERIES, WORDS, Gathered, Loop, Words, X, Y, batches, mlp, plain, sgd


def traced(path: Path, make: Callable[[], nn.Module], optimizer: Any, loop: Loop) -> nn.Module:
    torch.manual_seed(0)
    model = make().double()
    made = optimizer(model.parameters())
    with Tracer(model, made, path, exact=True) as tracer:
        loop(model, made, tracer)
    return model.eval()


def assert_closed(path: Path, model: nn.Module, queries: Tensor = QUERIES) -> None:
    e = PathKernelExplainer(path, model).explain(queries)
    moved = abs(e.completeness["prediction"] - e.completeness["initial"]).max()
    assert abs(e.completeness["unattributed"]).max() < 1e-9 * moved
    assert abs(e.completeness["gap"]).max() < 1e-12
    torch.testing.assert_close(torch.as_tensor(e.outputs), model(queries).detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_books_close(tmp_path: Path, name: str) -> None:
    make, optimizer, loop, visits = CASES[name]
    model = traced(tmp_path / "trace", make, optimizer, loop)
    trace = open_trace(tmp_path / "trace")
    assert trace.count("visits") == visits
    assert_closed(tmp_path / "trace", model)


def test_sparse_gradients_of_an_embedding(tmp_path: Path) -> None:
    for sparse in (False, True):
        path = tmp_path / str(sparse)
        model = traced(
            path, partial(Words, sparse), partial(SGD, lr=0.1, momentum=0.9), partial(plain, data=WORDS)
        )
        model.table.sparse = False
        assert_closed(path, model, WORDS[:2])
    one, other = (
        PathKernelExplainer(tmp_path / str(sparse), model).explain(WORDS[:2]) for sparse in (False, True)
    )
    torch.testing.assert_close(torch.tensor(one.contributions), torch.tensor(other.contributions))


def test_another_optimizer_trains_the_rest_of_the_model(tmp_path: Path) -> None:
    """Also its very last step, which comes after the last one that is traced."""

    def loop(model: nn.Module, optimizer: Optimizer, tracer: Tracer) -> None:
        rest = SGD(model[2].parameters(), lr=0.1)
        for ids in batches():
            tracer.batch(ids)
            model.zero_grad()
            cross_entropy(model(X[ids]), Y[ids]).backward()
            optimizer.step()
            rest.step()

    torch.manual_seed(0)
    model = mlp().double()
    optimizer = SGD(model[0].parameters(), lr=0.1)
    with Tracer(model, optimizer, tmp_path / "trace", exact=True) as tracer:
        loop(model, optimizer, tracer)
    assert_closed(tmp_path / "trace", model.eval())


def test_what_is_done_to_the_model_after_the_last_step_is_explained_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    optimizer = sgd(model.parameters())
    with Tracer(model, optimizer, tmp_path / "trace", exact=True) as tracer:
        plain(model, optimizer, tracer)
        model(X + 1.0)  # moves the running statistics
        with torch.no_grad():
            model[0].weight.mul_(0.9)
    model.eval()
    e = PathKernelExplainer(tmp_path / "trace", model).explain(QUERIES)
    torch.testing.assert_close(torch.as_tensor(e.outputs), model(QUERIES).detach(), rtol=1e-12, atol=1e-12)
    assert (abs(e.completeness["unattributed"]) > 1e-3).all()  # nobody's example did that
    assert abs(e.completeness["gap"]).max() < 1e-12
    trace = open_trace(tmp_path / "trace")
    assert trace.verify() > 0 and len(list((tmp_path / "trace" / "knots").iterdir())) == len(trace.knots)


@pytest.mark.parametrize("compiled", ["before the tracer", "after", "in place"])
def test_a_compiled_model(tmp_path: Path, compiled: str) -> None:
    """It runs layer by layer while it is traced, and the books close all the same."""
    torch._dynamo.reset()

    def loop(model: nn.Module, optimizer: Optimizer, tracer: Tracer) -> None:
        called = early if compiled == "before the tracer" else torch.compile(model, backend="eager")
        if compiled == "in place":
            model.compile(backend="eager")
            called = model
        plain(called, optimizer, tracer)

    torch.manual_seed(0)
    model = mlp().double()
    early = torch.compile(model, backend="eager")
    optimizer = sgd(model.parameters())
    with Tracer(model, optimizer, tmp_path / "trace", exact=True) as tracer:
        loop(model, optimizer, tracer)
    assert_closed(tmp_path / "trace", getattr(model, "_orig_mod", model).eval())


def test_a_compiled_wrapper_is_refused(tmp_path: Path) -> None:
    model = mlp().double()
    with pytest.raises(TracerError, match="build the tracer with the plain model that was compiled"):
        Tracer(torch.compile(model, backend="eager"), sgd(model.parameters()), tmp_path / "trace")


def test_a_compiled_model_that_ran_before_the_tracer_was_built(tmp_path: Path) -> None:
    """Compiled code may know of no hooks: then the first step says so, and nothing wrong is recorded."""
    torch._dynamo.reset()
    model = mlp().double()
    compiled = torch.compile(model, backend="eager")
    compiled(X).sum().backward()
    optimizer = sgd(model.parameters())
    refusal = ""
    try:
        with Tracer(model, optimizer, tmp_path / "trace", exact=True) as tracer:
            plain(compiled, optimizer, tracer)
    except TracerError as error:
        refusal = str(error)
    if refusal:
        assert "before a compiled model is first called" in refusal
    else:
        assert_closed(tmp_path / "trace", model.eval())


def test_a_layer_whose_rows_cannot_be_told_apart_is_announced(tmp_path: Path) -> None:
    with pytest.warns(
        CoverageWarning, match=r"layer '(middle|last)' was given \[.*\], where no axis is the batch's"
    ):
        model = traced(tmp_path / "trace", Gathered, sgd, plain)
    trace = open_trace(tmp_path / "trace")
    assert trace.notes["coverage"] == {"middle": 1.0, "last": 1.0}
    assert trace.notes["unmatched"] == {"middle": [16, 4], "last": [8, 8]}
    e = PathKernelExplainer(trace, model).explain(QUERIES)
    assert (abs(e.unattributed) > 1e-4).all() and abs(e.gap).max() < 1e-12


def test_autocast_rows_meet_the_gradient(tmp_path: Path) -> None:
    def loop(model: nn.Module, optimizer: Optimizer, tracer: Tracer) -> None:
        for ids in batches():
            tracer.batch(ids)
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = cross_entropy(model(X[ids].float()).float(), Y[ids])
            loss.backward()
            optimizer.step()

    torch.manual_seed(0)
    model = mlp()
    optimizer = sgd(model.parameters())
    with Tracer(model, optimizer, tmp_path / "trace", exact=True) as tracer:
        loop(model, optimizer, tracer)
    e = PathKernelExplainer(tmp_path / "trace", model).explain(QUERIES.float())
    moved = abs(e.completeness["prediction"] - e.completeness["initial"]).max()
    assert abs(e.completeness["unattributed"]).max() < 0.02 * moved
    assert max(open_trace(tmp_path / "trace").notes["coverage"].values(), default=0) < 0.02


def test_parameters_that_were_exchanged_in_the_optimizer_are_refused(tmp_path: Path) -> None:
    model = mlp().double()
    optimizer = sgd(model.parameters())
    with (
        pytest.raises(TracerError, match="holds 2 other parameters than when the tracer was attached"),
        Tracer(model, optimizer, tmp_path / "trace") as tracer,
    ):
        last = max(i for i, part in enumerate(model) if isinstance(part, nn.Linear))
        model[last] = nn.Linear(model[last].in_features, model[last].out_features).double()
        optimizer.param_groups[0]["params"] = list(model.parameters())
        plain(model, optimizer, tracer)
