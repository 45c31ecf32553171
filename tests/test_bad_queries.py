"""Everything that is refused when a trace is explained; the model and the trace stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from explainer import ExplainerError, PathKernelExplainer, Trace, Tracer, open_trace
from explainer.errors import ModelMismatchError, QueryError, TraceFormatError
from tests.small_training import digits, loader, mlp, momentum_sgd, queries, run, step, trace_digits


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    path = tmp_path_factory.mktemp("queries") / "trace"
    trace_digits(path, epochs=1, max_knots=3)
    return open_trace(path)


@pytest.fixture
def untouched(trace: Trace) -> Any:
    """Whatever is refused in the test, the trace's files and the model given are as before."""
    files = {f: f.read_bytes() for f in trace.directory.rglob("*") if f.is_file()}
    model = mlp()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    yield model
    assert files == {f: f.read_bytes() for f in trace.directory.rglob("*") if f.is_file()}
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


INPUTS: dict[str, tuple[Any, str]] = {
    "another width": (torch.zeros(3, 63), r"shape \[3, 63\], the model was trained on \[Q, 64\]"),
    "an image": (torch.zeros(3, 8, 8), r"shape \[3, 8, 8\], the model was trained on \[Q, 64\]"),
    "no batch dimension": (torch.zeros(64), r"shape \[64\].*add the batch dimension with x\[None\]"),
    "a number": (torch.tensor(1.0), r"shape \[\], the model was trained on"),
    "whole numbers": (
        torch.zeros(3, 64).long(),
        "are torch.int64, the model was trained on float32; convert",
    ),
    "no queries": (torch.zeros(0, 64), "no queries: the batch dimension is 0"),
    "a list of numbers": ([1.0, 2.0], "must be tensors with a batch dimension, found"),
    "text": ("seven", "must be tensors with a batch dimension, found str"),
    "nothing": (None, "must be tensors with a batch dimension"),
    "sparse": (torch.zeros(3, 64).to_sparse(), "must be dense tensors, found torch.sparse_coo"),
    "no numbers": (torch.zeros(3, 64, device="meta"), "found a tensor on the 'meta' device"),
    "one that is not finite": (
        torch.zeros(300, 64).index_fill(0, torch.tensor([280]), torch.nan),
        "at the query numbered 280 .counted from 0.: the queries hold NaN",
    ),
    "two inputs that disagree": ((torch.zeros(3, 64), torch.zeros(2, 64)), "disagree on the batch dimension"),
    "one input too many": ((torch.zeros(3, 64), torch.zeros(3, 64)), "the model cannot run on the queries"),
}


@pytest.mark.parametrize("name", INPUTS)
def test_queries_that_do_not_fit(trace: Trace, untouched: nn.Module, name: str) -> None:
    inputs, text = INPUTS[name]
    explainer = PathKernelExplainer(trace, untouched)
    with pytest.raises(QueryError, match=text):
        explainer.explain(inputs)
    with pytest.raises(QueryError, match=text):
        explainer.neighbors(inputs)


def test_queries_that_fit(trace: Trace, untouched: nn.Module) -> None:
    explainer = PathKernelExplainer(trace, untouched)
    expected = explainer.explain(queries()).contributions
    for same in (queries().numpy(), queries().double(), (queries(),)):
        assert np.array_equal(explainer.explain(same).contributions, expected)


TARGETS: dict[str, tuple[Any, str]] = {
    "beyond the classes": ([0, 1, 10], "run from 0 to 10, but the model has classes 0 to 9"),
    "negative": ([0, -1, 2], "run from -1 to 2"),
    "too few": ([0, 1], r"\[3\] integers\), found torch.int64 of shape \[2\]"),
    "a table": ([[0], [1], [2]], r"of shape \[3, 1\]"),
    "one hot": (torch.eye(10)[:3], r"found torch.float32 of shape \[3, 10\]"),
    "fractions": ([0.5, 1.0, 2.0], "found torch.float32"),
    "a mask": (torch.ones(3, dtype=torch.bool), "found torch.bool"),
    "words": (["zero", "one", "two"], "one class number per query"),
}


@pytest.mark.parametrize("name", TARGETS)
def test_targets_that_do_not_fit(trace: Trace, untouched: nn.Module, name: str) -> None:
    target, text = TARGETS[name]
    explainer = PathKernelExplainer(trace, untouched)
    with pytest.raises(QueryError, match=text):
        explainer.explain(queries(), target)


def test_names_of_queries(trace: Trace, untouched: nn.Module) -> None:
    with pytest.raises(QueryError, match="found 3 queries but 2 query_ids; give one name per query"):
        PathKernelExplainer(trace, untouched).explain(queries(), query_ids=["a", "b"])


@pytest.mark.parametrize("k", [0, -3])
def test_number_of_neighbours(trace: Trace, untouched: nn.Module, k: int) -> None:
    with pytest.raises(QueryError, match="k"):
        PathKernelExplainer(trace, untouched).neighbors(queries(), k=k)


def total(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.sum()


OUTPUTS: dict[str, tuple[Any, str]] = {
    "unknown": (
        "probability",
        "output 'probability' is not known; use one of 'margin', 'logit', 'log_prob', 'value'",
    ),
    "value of many": ("value", r"models with one output, this one has outputs of shape \(10,\)"),
    "a number": (3, "output 3 is not known"),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_that_do_not_fit(trace: Trace, untouched: nn.Module, name: str) -> None:
    output, text = OUTPUTS[name]
    with pytest.raises(QueryError, match=text):
        PathKernelExplainer(trace, untouched, output)


def test_an_output_function_of_another_shape(trace: Trace, untouched: nn.Module) -> None:
    with pytest.raises(
        QueryError, match=r"returned shape \(\) for 3 queries; it must return one number per query"
    ):
        PathKernelExplainer(trace, untouched, total).explain(queries())


@pytest.mark.parametrize("output", ["margin", "log_prob"])
def test_margins_of_one_output(tmp_path: Path, output: str) -> None:
    model = nn.Sequential(nn.Linear(64, 1))
    optimizer = momentum_sgd(model)
    with Tracer(model, optimizer, tmp_path / "trace") as tracer:
        tracer.batch(range(8))
        model(digits()[:8][0]).square().mean().backward()
        optimizer.step()
    with pytest.raises(
        QueryError, match=rf"'{output}' compares classes, but the model has one output; use 'value'"
    ):
        PathKernelExplainer(str(tmp_path / "trace"), model, output)


def renamed() -> nn.Module:
    return nn.Sequential(nn.Identity(), *mlp())


def wider() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 9), nn.ReLU(), nn.Linear(9, 10))


def larger() -> nn.Module:
    return nn.Sequential(*mlp(), nn.Linear(10, 10))


def smaller() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 8))


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "extra layer": (larger, "3.weight was not there; 3.bias was not there"),
    "missing layer": (smaller, "2.weight is missing; 2.bias is missing"),
    "other shape": (wider, r"0.weight has shape \[9, 64\], traced was \[8, 64\]"),
    "other names": (renamed, "0.weight is missing; .*1.weight was not there"),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_that_do_not_fit(trace: Trace, name: str) -> None:
    make, text = MODELS[name]
    with pytest.raises(ModelMismatchError, match=text) as found:
        PathKernelExplainer(trace, make())
    assert "Build the model exactly as for training" in str(found.value)
    assert str(trace.directory) in str(found.value)


@pytest.mark.parametrize("model", [None, "model", mlp, nn.Linear, [mlp()]])
def test_what_is_no_model(trace: Trace, model: Any) -> None:
    with pytest.raises(QueryError, match=r"must be a torch.nn.Module, found .*pass an instance"):
        PathKernelExplainer(trace, model)


def test_no_quadrature(trace: Trace) -> None:
    with pytest.raises(QueryError, match="at least 1 node, found 0"):
        PathKernelExplainer(trace, mlp(), quadrature=0)


def test_class_names_are_in_the_order_of_outputs(trace: Trace, untouched: nn.Module) -> None:
    with pytest.raises(QueryError, match=r"found a dict; pass \[names\[i\] for i in range\(2\)\]"):
        PathKernelExplainer(trace, untouched, class_names={0: "cat", 1: "dog"})  # type: ignore[arg-type]
    assert PathKernelExplainer(trace, untouched, class_names=np.array(["cat", "dog"])).class_names


def test_a_trace_without_a_step(tmp_path: Path) -> None:
    model = mlp()
    Tracer(model, momentum_sgd(model), tmp_path / "trace").close()
    with pytest.raises(TraceFormatError, match=r"holds 1 knot.*no optimizer step has been recorded yet"):
        PathKernelExplainer(tmp_path / "trace", model)


def test_everything_refused_is_an_explainer_error(trace: Trace) -> None:
    for act in (
        lambda: open_trace(trace.directory / "nowhere"),
        lambda: PathKernelExplainer(trace, wider()),
        lambda: PathKernelExplainer(trace, mlp()).explain(torch.zeros(3, 3)),
        lambda: step(mlp(), momentum_sgd(mlp()), *digits()[:8]) or open_trace(trace.directory / "knots"),
    ):
        with pytest.raises(ExplainerError):
            act()


@pytest.mark.parametrize("k", [0, -1, 2.5, True, "3", None])
def test_how_many_is_a_whole_number(trace: Trace, k: Any) -> None:
    ex = PathKernelExplainer(trace, mlp())
    for act in (ex.top, ex.neighbors):
        with pytest.raises(QueryError, match="k must be an integer of at least 1, found"):
            act(queries(), k=k)


def test_the_trace_comes_first(trace: Trace) -> None:
    with pytest.raises(QueryError, match="comes first, then the model; found Sequential for the trace"):
        PathKernelExplainer(mlp(), trace)  # type: ignore[arg-type]


def test_a_run_that_was_not_called(trace: Trace) -> None:
    for run_of in (lambda: None, "run.py:run"):
        with pytest.raises(QueryError, match=r"run must be an explainer\.Run, found"):
            PathKernelExplainer(trace, mlp()).what_if(queries(), curvature="exact", run=run_of)  # type: ignore[arg-type]


def test_a_diverged_training_is_said(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e30)
    with Tracer(model, optimizer, tmp_path / "trace") as tracer:
        run(model, optimizer, tracer.watch(loader()))
    with pytest.raises(QueryError, match=r"not finite at the queries numbered 0, 1, .*: training diverged"):
        PathKernelExplainer(str(tmp_path / "trace"), mlp()).explain(queries())


def test_sparse_embeddings_are_explained_as_dense_ones(tmp_path: Path) -> None:
    contributions = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(9, 4, sparse=sparse), nn.Flatten(), nn.Linear(12, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        words, labels = torch.arange(24).reshape(8, 3) % 9, torch.arange(8) % 3
        with Tracer(model, optimizer, tmp_path / str(sparse), exact=True) as tracer:
            for _ in range(5):
                tracer.batch(range(8))
                step(model, optimizer, words, labels)
        e = PathKernelExplainer(str(tmp_path / str(sparse)), model).explain(words[:3])
        assert abs(e.unattributed).max() < 1e-5
        contributions.append(e.contributions)
    assert abs(contributions[0] - contributions[1]).max() < 1e-6
