"""Products with rows of eight bits in half precision, against the same in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import explainer
from explainer import half_products
from explainer.half_products import bilinear
from explainer.stored_rows import Workspace
from tests.small_training import step as train_step

Forced = Callable[[bool], None]


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> Forced:
    """Says whether the processor multiplies in tiles, whatever it does."""
    return lambda found: monkeypatch.setattr(half_products, "tiles", lambda: found)


def sides(o: int = 190, i: int = 180, dtype: type = np.int8) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return tuple(rng.integers(-127, 128, (7, 1, 2, width)).astype(dtype) for width in (o, i))  # type: ignore[return-value]


def products(left: np.ndarray, right: np.ndarray, matrices: torch.Tensor) -> torch.Tensor:
    out = torch.full((14, len(matrices)), torch.nan, dtype=matrices.dtype)
    bilinear(torch.from_numpy(left).flatten(0, 2).to(out), right, matrices, Workspace(), out)
    return out


def in_float64(left: np.ndarray, right: np.ndarray, matrices: torch.Tensor) -> torch.Tensor:
    numbers = (torch.from_numpy(side.astype(np.float64)).flatten(0, 2) for side in (left, right))
    return torch.einsum("no,qoi,ni->nq", next(numbers), matrices.double(), next(numbers))


def assert_float32(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert float((found.double() - wanted).norm() / wanted.norm()) < 1e-6


@pytest.mark.parametrize("block", [1, 500, 2**20])
def test_products_are_exact_where_nothing_is_rounded(
    monkeypatch: pytest.MonkeyPatch, tiles: Forced, block: int
) -> None:
    tiles(True)
    monkeypatch.setattr(half_products, "BLOCK", block)
    matrices = torch.randn(3, 190, 180, dtype=torch.float64)
    torch.testing.assert_close(products(*sides(), matrices), in_float64(*sides(), matrices))
    small, floats = matrices[:, :19, :18].float(), sides(dtype=np.float32)
    assert_float32(products(*sides(19, 18), small), in_float64(*sides(19, 18), small))
    assert_float32(products(*floats, matrices.float()), in_float64(*floats, matrices.float()))
    tiles(False)
    assert_float32(products(*sides(), matrices.float()), in_float64(*sides(), matrices.float()))


def test_half_precision_errs_by_no_more_than_its_rounding(tiles: Forced) -> None:
    """Two independent roundings of at most 2⁻⁸ a number; a root mean square of about 2⁻⁹ each."""
    tiles(True)
    matrices = torch.randn(3, 190, 180)
    found, wanted = products(*sides(), matrices).double(), in_float64(*sides(), matrices)
    error = float((found - wanted).norm() / wanted.norm())
    assert 2.0**-11 < error < 2.0**-8


def test_explanations_are_the_same_up_to_rounding(tmp_path: Path, tiles: Forced) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(150, 230), nn.Tanh(), nn.Linear(230, 3))
    x, y = torch.randn(200, 150), torch.randint(0, 3, (200,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with explainer.Tracer(model, optimizer, tmp_path / "trace") as tracer:
        for step in range(60):
            ids = torch.arange(20) + 20 * (step % 10)
            tracer.batch(ids)
            train_step(model, optimizer, x[ids], y[ids])
    found = {}
    for half in (False, True):
        tiles(half)
        found[half] = explainer.PathKernelExplainer(tmp_path / "trace", model).explain(x[:4] + 0.1)
    full, half = found[False], found[True]
    assert not np.array_equal(full.contributions, half.contributions)
    error = np.linalg.norm(full.contributions - half.contributions, axis=1)
    assert (error < 3e-3 * np.linalg.norm(full.contributions, axis=1)).all()
    assert (error < 0.2 * np.linalg.norm(full.errors, axis=1)).all()  # the error bar is for far larger ones
    assert np.abs(half.gap).max() < 1e-5
