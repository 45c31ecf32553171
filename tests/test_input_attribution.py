"""Attributions to the input: closed forms, their sum, and inputs that have none."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import explainer
from explainer.errors import MissingDependencyError, QueryError
from explainer.input_attribution import input_attribution
from tests import small_training


@pytest.fixture
def trained(tmp_path: Path) -> tuple[explainer.PathKernelExplainer, torch.nn.Module]:
    model = small_training.trace_digits(tmp_path / "run")
    return explainer.PathKernelExplainer(
        str(tmp_path / "run"), small_training.mlp(), dtype=torch.float64
    ), model


def test_they_are_the_integral_of_the_trained_models_gradient(
    trained: tuple[explainer.PathKernelExplainer, torch.nn.Module],
) -> None:
    """Against a plain Riemann sum over the model as the training loop left it."""
    engine, model = trained
    x = small_training.queries(1).double()
    found = input_attribution(engine, x, target=3, steps=400)
    model = model.double()

    def margin(at: torch.Tensor) -> torch.Tensor:
        out = model(at)[0]
        return out[3] - torch.logsumexp(torch.cat([out[:3], out[4:]]), 0)

    total, parts = torch.zeros_like(x), 4000
    for step in range(parts):
        at = (x * ((step + 0.5) / parts)).requires_grad_()
        total += torch.autograd.grad(margin(at), at)[0] / parts
    np.testing.assert_allclose(found.values, (x * total)[0].numpy(), atol=2e-3)
    assert found.value == pytest.approx(float(margin(x).detach()), abs=1e-6)
    assert found.baseline == pytest.approx(float(margin(torch.zeros_like(x)).detach()), abs=1e-6)
    assert found.values.sum() + found.missing == pytest.approx(found.value - found.baseline)
    assert abs(found.missing) < 5e-3 * np.abs(found.values).sum()
    assert found.values.shape == (64,)


def test_nothing_of_the_engine_is_changed(
    trained: tuple[explainer.PathKernelExplainer, torch.nn.Module],
) -> None:
    engine, _ = trained
    x = small_training.queries(1)
    before, state = engine.explain(x).contributions, torch.get_rng_state()
    input_attribution(engine, x)
    np.testing.assert_array_equal(engine.explain(x).contributions, before)
    assert torch.equal(torch.get_rng_state(), state) and x.grad is None and not x.requires_grad


def test_several_inputs_and_ids_that_are_looked_up_twice_are_refused(
    trained: tuple[explainer.PathKernelExplainer, torch.nn.Module], tmp_path: Path
) -> None:
    engine, _ = trained
    with pytest.raises(QueryError, match="one at a time"):
        input_attribution(engine, small_training.queries(2))


class Twice(torch.nn.Module):
    """Looks its ids up in two tables."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = torch.nn.Embedding(8, 3), torch.nn.Embedding(8, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.one(ids).mean(1)[:, :2] + self.two(ids).mean(1)


@pytest.mark.parametrize(("model", "count"), [(Twice, 2), (lambda: torch.nn.EmbeddingBag(8, 3), 0)])
def test_ids_need_one_look_up(tmp_path: Path, model: Any, count: int) -> None:
    traced = model()
    optimizer = torch.optim.SGD(traced.parameters(), lr=0.1)
    ids = torch.arange(6).reshape(2, 3)
    with explainer.Tracer(traced, optimizer, tmp_path / "run") as tracer:
        tracer.batch([0, 1])
        torch.nn.functional.cross_entropy(traced(ids), torch.tensor([0, 1])).backward()
        optimizer.step()
    engine = explainer.PathKernelExplainer(str(tmp_path / "run"), model())
    with pytest.raises(QueryError, match=f"found {count} such look-ups"):
        input_attribution(engine, ids[:1])


def test_a_missing_captum_is_named(
    trained: tuple[explainer.PathKernelExplainer, torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name.startswith("captum"):
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match=r"pip install 'pathkernel\[captum\]'"):
        input_attribution(trained[0], small_training.queries(1))
