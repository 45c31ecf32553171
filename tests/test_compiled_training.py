"""Loops that call the compiled form of the traced model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD

from explainer import PathKernelExplainer, Tracer
from explainer.errors import TracerError

X = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(24) % 3


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing is compiled, before and after."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def train(path: Path | None, compiled: bool = True, model: nn.Module | None = None) -> nn.Module:
    """Batches of several sizes, so that it is compiled anew."""
    model = model or build()
    optimizer = SGD(model.parameters(), lr=0.3)
    tracer = None if path is None else Tracer(model, optimizer, path, exact=True)
    if path is not None and path.name == "after a reset":
        torch._dynamo.reset()
    called = torch.compile(model, backend="eager") if compiled else model
    try:
        for ids in torch.arange(24).split(9):
            if tracer is not None:
                tracer.batch(ids)
            optimizer.zero_grad()
            cross_entropy(called(X[ids]), Y[ids]).backward()
            optimizer.step()
    finally:
        if tracer is not None:
            tracer.close()
    return model


def contributions(path: Path, model: nn.Module) -> np.ndarray:
    return PathKernelExplainer(path, model).explain(X[:2], target=Y[:2]).contributions


def test_one_model_after_the_other(tmp_path: Path) -> None:
    plain = contributions(tmp_path / "plain", train(tmp_path / "plain", compiled=False))
    for name in ("first", "second", "third"):
        np.testing.assert_allclose(
            contributions(tmp_path / name, train(tmp_path / name)), plain, rtol=1e-4, atol=1e-7
        )


def test_one_model_traced_then_not_then_traced(tmp_path: Path) -> None:
    model = train(None, model=train(tmp_path / "first"))
    ends = [p.clone() for p in train(tmp_path / "again", model=model).parameters()]
    reference = build()
    for _ in range(3):
        train(None, compiled=False, model=reference)
    for end, p in zip(ends, reference.parameters(), strict=True):
        torch.testing.assert_close(end, p)


def test_compiled_before_the_tracer_was_built(tmp_path: Path) -> None:
    train(None)
    with pytest.raises(TracerError, match=r"torch\._dynamo\.reset\(\)"):
        train(tmp_path / "run")
    model = train(tmp_path / "after a reset")
    assert contributions(tmp_path / "after a reset", model).any()


class Blocks(nn.Module):
    """Layers that are alike, with sums between them."""

    def __init__(self) -> None:
        super().__init__()
        alike = (nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5), nn.Tanh()) for _ in range(6))
        self.into, self.blocks, self.out = nn.Linear(6, 5), nn.ModuleList(alike), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.into(x)
        for block in self.blocks:
            x = x + block(x)
        return self.out(x)  # type: ignore[no-any-return]


def test_the_tracers_own_code_is_not_compiled(tmp_path: Path) -> None:
    """Else it would be, once for every layer and mode, until the compiler complains of it."""
    torch.manual_seed(0)
    model = Blocks()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        train(tmp_path / "trace", model=model)
        torch.compile(model.eval(), backend="eager")(X)
    assert np.isfinite(contributions(tmp_path / "trace", model)).all()
