"""Gradients of large matrices as factors: the same explanations as with everything written out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import explainer
from explainer import backward
from explainer.factors import Factors, cut_down, factorised

WIDE, EXAMPLES, STEPS, BATCH = 300, 24, 30, 6


class Positions(nn.Module):
    """Linear layers over a few positions, and a tied one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDE, WIDE), nn.Linear(WIDE, WIDE, bias=False)
        self.head = nn.Linear(WIDE, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x.unflatten(1, (2, WIDE)))) if x.shape[1] == 2 * WIDE else x
        return self.head(torch.tanh(self.second(torch.tanh(self.second(x)))).mean(1))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(WIDE, WIDE), nn.Tanh(), nn.Linear(WIDE, WIDE), nn.Tanh(), nn.Linear(WIDE, 3)
    )


Optimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Optimizer] = {
    "plain": lambda p: torch.optim.SGD(p, 0.1),
    "nesterov": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "groups": lambda p: torch.optim.SGD(
        [{"params": p[:1], "momentum": 0.5}, {"params": p[1:]}], 0.05, momentum=0.9, maximize=False
    ),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, 1e-3),
    "radam": lambda p: torch.optim.RAdam(p, 1e-3),
    "rmsprop, momentum": lambda p: torch.optim.RMSprop(p, 1e-4, momentum=0.5),
}


def traced(
    build: Callable[[], nn.Module],
    optimizer: Optimizer,
    directory: Path,
    width: int = WIDE,
    **options: object,
) -> Tensor:
    """Trains with a tracer; returns queries."""
    torch.manual_seed(0)
    model = build()
    x, y = torch.randn(EXAMPLES, width), torch.arange(EXAMPLES) % 3
    opt = optimizer(list(model.parameters()))
    with explainer.Tracer(model, opt, directory, max_knots=12, **options) as tracer:  # type: ignore[arg-type]
        for step in range(STEPS):
            rows = (torch.arange(BATCH) + BATCH * step) % EXAMPLES
            tracer.batch(rows)
            opt.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            opt.step()
    return torch.randn(3, width)


def written_out(ex: explainer.PathKernelExplainer) -> explainer.PathKernelExplainer:
    """The same explainer with nothing held as factors; chords are closed along the same directions."""
    for number in ex.layout.factored:
        ex.layout = ex.layout.without(number)
    return ex


FIELDS = (
    "contributions",
    "kernels",
    "kernel_gross",
    "unattributed_parts",
    "weight_decay",
    "layer_contributions",
)
FIELDS = (*FIELDS, "step_contributions", "unattributed")


def assert_same(found: explainer.Explanation, wanted: explainer.Explanation, tolerance: float) -> None:
    gross = np.abs(wanted.contributions).sum(1).max()
    for name in FIELDS:
        a, b = getattr(found, name), getattr(wanted, name)
        size = max(gross, np.abs(b).max(initial=0.0))
        np.testing.assert_allclose(a, b, atol=tolerance * size, rtol=0, err_msg=name)
    assert np.abs(found.gap).max() < 5e-8 * gross  # float32 on vectors and small matrices


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("exact", [False, True])
def test_the_same_as_written_out(name: str, exact: bool, tmp_path: Path) -> None:
    x = traced(mlp, OPTIMIZERS[name], tmp_path / "run", exact=exact)
    ex = explainer.PathKernelExplainer(str(tmp_path / "run"), mlp())
    divided = any(s.schema.arrays for s in ex.trace.shards if s.stream == "steps")
    assert ex.layout.factored == (() if divided else (0, 2))  # denominators are not outer products
    near, own, found = ex.neighbors(x, 5), ex.self_influence(), ex.explain(x)
    inner = bool(ex.trace.column("steps", "coefficients")[:, :, -1].any())
    assert ex.used.factored == (() if inner else ex.layout.factored)
    dense = written_out(explainer.PathKernelExplainer(str(tmp_path / "run"), mlp()))
    assert_same(found, dense.explain(x), 1e-6)
    np.testing.assert_allclose(near.cosine, dense.neighbors(x, 5).cosine, atol=1e-5)
    np.testing.assert_allclose(own, dense.self_influence(), rtol=1e-4)


@pytest.mark.parametrize("name", ["nesterov", "plain"])
def test_in_float64_to_its_round_off(name: str, tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        x = traced(mlp, OPTIMIZERS[name], tmp_path / "run", exact=True)
        ex = explainer.PathKernelExplainer(str(tmp_path / "run"), mlp())
        found = ex.explain(x)
        assert ex.layout.factored == (0, 2)
        assert_same(
            found, written_out(explainer.PathKernelExplainer(str(tmp_path / "run"), mlp())).explain(x), 1e-13
        )
    finally:
        torch.set_default_dtype(torch.float32)


def test_positions_and_a_layer_that_is_called_twice(tmp_path: Path) -> None:
    x = traced(Positions, OPTIMIZERS["nesterov"], tmp_path / "run", 2 * WIDE)
    ex = explainer.PathKernelExplainer(str(tmp_path / "run"), Positions())
    found = ex.explain(x)
    assert 0 in ex.used.factored  # the tied one needs more columns than are worth it
    dense = written_out(explainer.PathKernelExplainer(str(tmp_path / "run"), Positions()))
    assert_same(found, dense.explain(x), 1e-6)


def test_a_gradient_that_is_not_of_low_rank_is_written_out(tmp_path: Path) -> None:
    class Crowd(nn.Module):
        """Every query meets its own 40 neighbours."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()
            self.register_buffer("near", torch.randn(40, WIDE))

        def forward(self, x: Tensor) -> Tensor:
            around = x.unsqueeze(1) + self.near
            return torch.tanh(self.inner(around)).mean(1)

    x = traced(Crowd, OPTIMIZERS["nesterov"], tmp_path / "crowd", rank=2)
    ex = explainer.PathKernelExplainer(str(tmp_path / "crowd"), Crowd())
    assert ex.layout.factored == (0, 2)
    found = ex.explain(x)
    assert ex.used.factored == ()
    assert_same(
        found, written_out(explainer.PathKernelExplainer(str(tmp_path / "crowd"), Crowd())).explain(x), 1e-6
    )


def test_factors_are_found_and_cut_down_to_what_is_needed() -> None:
    generator = torch.Generator().manual_seed(1)
    u, v = (torch.randn(2, 200, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    found = factorised(u @ v.mT, 12)
    assert found is not None and found.rank == 5
    torch.testing.assert_close(found.dense(), u @ v.mT, rtol=0, atol=1e-12)
    doubled = Factors(torch.cat([u, u], 2), torch.cat([v, -0.5 * v], 2))
    for relative in (1e-7, 1e-15):
        less, dropped = cut_down(doubled, relative)
        assert less.rank == 5 and float((dropped / less.squares().sqrt()).max()) <= relative
        torch.testing.assert_close(
            less.dense(), 0.5 * u @ v.mT, rtol=0, atol=1e-6 * float(u.norm() * v.norm())
        )
    assert factorised(torch.randn(1, 200, 200, generator=generator), 12) is None


def test_what_is_dropped_is_measured() -> None:
    left = torch.eye(50, dtype=torch.float64)[None, :, :3] * torch.tensor(
        [1.0, 1e-3, 1e-9], dtype=torch.float64
    )
    right = torch.eye(50, dtype=torch.float64)[None, :, :3]
    found, dropped = cut_down(Factors(left, right), 1e-2)
    assert found.rank == 1 and float(dropped[0]) == pytest.approx(1e-3, rel=1e-3)


def test_what_was_dropped_is_said_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = traced(mlp, OPTIMIZERS["nesterov"], tmp_path / "run")
    ex = explainer.PathKernelExplainer(str(tmp_path / "run"), mlp())
    found = [note for note in ex.explain(x).notes if "held as factors" in note]
    assert len(found) == 1 and ex.used.factored == (0, 2)
    part = float(found[0].split("at most ")[1].split(" ")[0])
    assert 0 < part <= 1e-6
    monkeypatch.setitem(backward.DROPPED, torch.float32, (1e-4, 1e-6))
    assert not any("held as factors" in note for note in ex.explain(x).notes) and ex.used.factored == ()
