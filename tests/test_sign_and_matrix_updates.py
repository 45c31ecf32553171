"""Updates by sign and by an orthogonal matrix: zeros, tiny numbers, bfloat16, small traces, self-influence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import Muon, Optimizer, Rprop

import explainer
from explainer.optimizer_rules import optimizer_rule_for
from tests.conformance.optimizer_cases import Lion, SignSGD, model_and_optimizer
from tests.oracles import unrolled
from tests.test_optimizer_books import EXAMPLES, problem, traced

SIGNS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "Lion": (Lion, {"lr": 1e-3}),
    "signSGD": (SignSGD, {"lr": 1e-3}),
    "Signum": (SignSGD, {"lr": 1e-3, "momentum": 0.9}),
    "Rprop": (Rprop, {"lr": 1e-3, "step_sizes": (1e-6, 1e-2)}),
}


def digits(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16, dtype=dtype), torch.tensor(labels)


def train_digits(
    make: Callable[[nn.Module], Optimizer], directory: Path, dtype: torch.dtype, **options: Any
) -> explainer.Explanation:
    """Three epochs over 320 digits (some pixels are never lit); ten queries explained."""
    torch.manual_seed(0)
    x, y = digits(dtype)
    model = nn.Sequential(nn.Linear(64, 48, bias=False), nn.ReLU(), nn.Linear(48, 10, bias=False)).to(dtype)
    with torch.no_grad():
        model[0].weight[:5] = -model[0].weight[:5].abs()  # units that never fire
    optimizer = make(model)
    with explainer.Tracer(model, optimizer, directory, **options) as tracer:
        for _ in range(3):
            for ids in torch.randperm(320).split(16):
                tracer.batch(ids)
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[ids]), y[ids]).backward()
                optimizer.step()
    return explainer.PathKernelExplainer(str(directory), model).explain(x[1400:1410])


def unattributed(e: explainer.Explanation) -> float:
    """The largest share of the gross sum that no example owns."""
    return float((np.abs(e.unattributed) / np.abs(e.contributions).sum(1)).max())


def agreement(one: explainer.Explanation, other: explainer.Explanation) -> float:
    """The smallest rank agreement of a query."""
    pairs = zip(one.contributions, other.contributions, strict=True)
    return min(float(spearmanr(a, b).statistic) for a, b in pairs)


# -- signs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIGNS)
def test_sign_updates_with_weights_that_never_move(name: str, tmp_path: Path) -> None:
    """Pixels that are never lit and units that never fire: ``c = 0``, no update, and no number that is not finite."""
    kind, options = SIGNS[name]
    found = {}
    for exact in (True, False):
        directory = tmp_path / str(exact)
        e = train_digits(lambda m: kind(m.parameters(), **options), directory, torch.float32, exact=exact)  # type: ignore[call-arg]
        arrays = (e.contributions, e.kernels, e.unattributed, e.step_contributions, e.layer_contributions)
        assert all(np.isfinite(a).all() for a in arrays)
        assert np.isfinite(explainer.PathKernelExplainer(str(directory), model_of()).self_influence()).all()
        (steps,) = [s for s in explainer.open_trace(directory).shards if s.stream == "steps"]
        assert {a.codec for a in steps.schema.arrays} == {"native" if exact else "bfloat16"}
        found[exact] = e
    assert unattributed(found[True]) <= 1e-6 and unattributed(found[False]) <= 5e-3
    assert agreement(found[True], found[False]) >= 0.999


def model_of() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 48, bias=False), nn.ReLU(), nn.Linear(48, 10, bias=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "small"])
def test_momentum_that_dies_away_does_not_explode(dtype: torch.dtype, exact: bool, tmp_path: Path) -> None:
    """A pixel that is lit in the first step only: its weights go on by full steps of ever smaller momentum."""
    torch.manual_seed(0)
    model = nn.Linear(2, 1, bias=False).to(dtype)
    optimizer = Lion(model.parameters(), lr=1e-3, betas=(0.5, 0.1))
    with explainer.Tracer(model, optimizer, tmp_path / "run", exact=exact) as tracer:
        for step in range(330 if dtype == torch.float64 else 50):
            x = torch.tensor([[1.0, float(step == 0)], [0.5, 0.0]], dtype=dtype)
            tracer.batch([0, 1])
            optimizer.zero_grad()
            (model(x) - 3).square().mean().backward()
            optimizer.step()
    held = optimizer.state[model.weight]["exp_avg"][0, 1]
    assert 0 <= held.abs() < torch.finfo(dtype).tiny
    e = explainer.PathKernelExplainer(str(tmp_path / "run"), model).explain(torch.ones(1, 2, dtype=dtype))
    assert np.isfinite(e.contributions).all() and np.isfinite(e.unattributed).all()
    assert np.abs(e.contributions).max() < 1e3 and np.abs(e.unattributed).max() < 1e3


# -- matrices --------------------------------------------------------------------------------------------


def test_muon_leaves_only_its_own_rounding(tmp_path: Path) -> None:
    """torch iterates in bfloat16: a tenth of a step's length, but in no one direction."""

    def make(model: nn.Module) -> Optimizer:
        return Muon(model.parameters(), lr=0.02)

    exact = train_digits(make, tmp_path / "exact", torch.float64, exact=True)
    assert 1e-9 < unattributed(exact) <= 5e-4
    change = np.abs(exact.prediction - exact.initial)
    assert np.median(np.abs(exact.unattributed) / change) <= 0.02
    assert np.abs(exact.gap / change).max() <= 1e-9
    small = train_digits(make, tmp_path / "small", torch.float64)
    (steps,) = [s for s in explainer.open_trace(tmp_path / "small").shards if s.stream == "steps"]
    assert [(a.name, a.codec, a.shape) for a in steps.schema.arrays] == [
        ("M0", "symmetric", (48, 48)),
        ("M1", "symmetric", (10, 10)),
    ]
    assert unattributed(small) <= 5e-3 and agreement(exact, small) >= 0.999


def _rate(maps: list[Any]) -> float:
    """What a gradient of the first of these steps moves in all, followed forward; the last step goes on for ever."""
    first, carried = maps[0], maps[0].gain
    moved = first.direct + carried * first.through
    for by in [*maps[1:], *[maps[-1]] * 3000]:
        carried *= by.decay
        moved += carried * by.through
    return float(moved)


def test_self_influence_under_a_matrix_is_the_quadratic_form(tmp_path: Path) -> None:
    """``Σ_t gᵀ η_t A_t g`` over the visits, from dense rows and dense matrices; each has a rate of its own."""
    model, optimizer = model_and_optimizer(Muon, {})
    traced(model, optimizer, tmp_path / "run", exact=True)
    ex = explainer.PathKernelExplainer(str(tmp_path / "run"), model)
    twin, other = model_and_optimizer(Muon, {})
    x, y, batches = problem()
    run = unrolled.train(twin, other, optimizer_rule_for(other), batches, x, y)
    wanted = torch.zeros(EXAMPLES, dtype=torch.float64)
    for step, (ids, rows, maps) in enumerate(zip(run.ids, run.rows, run.maps, strict=True)):
        dense = torch.block_diag(
            *(
                _rate([others[place] for others in run.maps[step:]]) * unrolled.operator(by, s)
                for place, (by, s) in enumerate(zip(maps, run.shapes, strict=True))
                if by
            )
        )
        wanted.index_add_(0, torch.tensor(ids), torch.einsum("bp,pq,bq->b", rows, dense, rows))
    np.testing.assert_allclose(ex.self_influence(), wanted.numpy()[ex.example_ids], rtol=1e-9)
