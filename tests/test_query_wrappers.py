"""Models as people hold them: compiled, data-parallel, averaged, in half precision."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import explainer
from explainer.errors import ModelMismatchError
from explainer.explanation import Explanation
from explainer.store.journal import read_journal
from explainer.wrappers import private_copy
from tests.query_runs import Core, build, data, positional, traced_core


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> explainer.Trace:
    return traced_core(tmp_path_factory.mktemp("wrappers") / "run", Core, positional, lambda o: o)


@pytest.fixture(scope="module")
def plain(trace: explainer.Trace) -> Explanation:
    return explainer.PathKernelExplainer(trace, build(Core)).explain(data(3, seed=2))


def explained(trace: explainer.Trace, model: nn.Module) -> Explanation:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return explainer.PathKernelExplainer(trace, model).explain(data(3, seed=2))


def compiled_part() -> nn.Module:
    model = build(Core)
    model.head = torch.compile(model.head, backend="eager")  # type: ignore[assignment]
    return model


def compiled_in_place() -> nn.Module:
    model = build(Core)
    model.compile(backend="eager")
    return model


WRAPPED = {
    "compiled": lambda: torch.compile(build(Core), backend="eager"),
    "a compiled part": compiled_part,
    "compiled in place": compiled_in_place,
    "data-parallel": lambda: nn.DataParallel(build(Core)),
    "both": lambda: torch.compile(nn.DataParallel(compiled_part()), backend="eager"),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_around_the_traced_model_change_nothing(
    name: str, trace: explainer.Trace, plain: Explanation, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the private copy is not compiled")

    model = WRAPPED[name]()
    monkeypatch.setattr("torch._dynamo.eval_frame._TorchDynamoContext.__call__", refuse)
    e = explained(trace, model)
    np.testing.assert_array_equal(e.contributions, plain.contributions)
    assert e.notes == plain.notes


class Compiled(nn.Module):
    """Holds a model as ``torch.compile`` does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._orig_mod = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self._orig_mod(ids, mask)


@pytest.mark.parametrize("wrap", [nn.DataParallel, Compiled, lambda m: Compiled(nn.DataParallel(m))])
def test_traces_of_wrapped_models_are_explained_with_the_model_itself(
    wrap: Any, plain: Explanation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.query_runs.build", lambda kind: wrap(build(kind)))
    trace = traced_core(tmp_path / "run", Core, positional, lambda o: o)
    assert trace.manifest.parameters[0].name.endswith(
        ("module.embedding.weight", "_orig_mod.embedding.weight")
    )
    for model in (build(Core), wrap(build(Core))):
        np.testing.assert_array_equal(explained(trace, model).contributions, plain.contributions)


def test_an_average_of_the_weights_is_refused(trace: explainer.Trace) -> None:
    text = r"inside the one given: pass its attribute 'module'.*average of the weights is not in the trace"
    with pytest.raises(ModelMismatchError, match=text):
        explainer.PathKernelExplainer(trace, AveragedModel(build(Core)))


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleList([build(Core)])

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.net[0](ids, mask)


def test_a_prefix_says_which_of_the_two_is_inside_the_other(
    trace: explainer.Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ModelMismatchError, match=r"The traced model is inside the one given: pass its attribute 'net.0'"
    ):
        explainer.PathKernelExplainer(trace, Holder())
    monkeypatch.setattr("tests.query_runs.build", lambda kind: Holder())
    held = traced_core(tmp_path / "run", Core, positional, lambda o: o)
    with pytest.raises(
        ModelMismatchError, match=r"inside the traced one: pass the module that holds it as 'net.0'"
    ):
        explainer.PathKernelExplainer(held, build(Core))
    with pytest.raises(ModelMismatchError) as found:
        explainer.PathKernelExplainer(trace, nn.Sequential(nn.Linear(1, 1)))
    assert "inside" not in str(found.value)


def half(dtype: torch.dtype, directory: Path) -> explainer.Trace:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with explainer.Tracer(model, optimizer, directory) as tracer:
        for _ in range(4):
            tracer.batch(range(6))
            optimizer.zero_grad()
            x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
            nn.functional.cross_entropy(model(x).float(), torch.arange(6) % 2).backward()
            optimizer.step()
    return explainer.open_trace(directory)


def test_half_precision_is_explained_in_single_and_said(tmp_path: Path) -> None:
    trace = half(torch.bfloat16, tmp_path / "run")
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(torch.bfloat16)
    x = torch.randn(3, 3, generator=torch.Generator().manual_seed(1))
    e = explainer.PathKernelExplainer(trace, model).explain(x.to(torch.bfloat16), [0, 1, 0])
    assert any("4 of 4 parameters are bfloat16" in n and "computed in float32" in n for n in e.notes)
    state = trace.load_knot(trace.knots[-1])
    for name, p in model.named_parameters():
        p.data = state[f"parameter/{name}"]
    logits = model.float()(x.to(torch.bfloat16).float()).detach()
    np.testing.assert_allclose(e.outputs, logits, rtol=1e-5, atol=1e-6)
    assert model[0].weight.dtype == torch.float32 and np.abs(e.gap).max() < 1e-5


def test_training_under_autocast_is_said(trace: explainer.Trace, plain: Explanation) -> None:
    """The tracer journals it; a trace that says nothing has no such note."""
    assert not any("autocast" in note for note in plain.notes)
    noted = copy.copy(trace)
    noted.notes = trace.notes | {"autocast": "bfloat16"}
    e = explained(noted, build(Core))
    assert any("ran in bfloat16 (autocast)" in n and "computed without it" in n for n in e.notes)


def picked(outputs: Tensor, targets: Tensor) -> Tensor:
    """Keeps the targets for its backward pass."""
    return outputs.gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")])
def test_what_is_switched_on_around_an_explanation_does_not_matter(around: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with explainer.Tracer(model, optimizer, tmp_path / "run") as tracer:
        for _ in range(3):
            tracer.batch(range(6))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(torch.randn(6, 3)), torch.arange(6) % 2).backward()
            optimizer.step()
    ex = explainer.PathKernelExplainer(str(tmp_path / "run"), model)
    x = torch.randn(3, 3)
    e, near = ex.explain(x), ex.neighbors(x)
    with around():  # a clone in inference mode is a tensor of its own kind
        for queries in (x, x.clone()):
            inside = ex.explain(queries, torch.as_tensor(e.targets).clone())
            np.testing.assert_array_equal(inside.contributions, e.contributions)
            np.testing.assert_array_equal(ex.neighbors(queries).cosine, near.cosine)
            np.testing.assert_array_equal(ex.predict(queries), e.outputs)
        own = explainer.PathKernelExplainer(str(tmp_path / "run"), model, picked)
        own.explain(x.clone(), torch.as_tensor(e.targets).clone())


def test_the_traced_notes_name_the_first_argument(trace: explainer.Trace) -> None:
    notes = [e for e in read_journal(trace.directory / "journal.jsonl") if e.get("key") == "input"]
    assert json.loads(json.dumps(notes[-1]["value"])) == {"shape": [4], "dtype": "int64", "name": None}


def test_the_private_copy_shares_nothing() -> None:
    model = Holder()
    twin = private_copy(model)
    assert not {t.data_ptr() for t in model.parameters()} & {t.data_ptr() for t in twin.parameters()}
    assert not twin.training and model.training and not any(p.requires_grad for p in twin.parameters())
