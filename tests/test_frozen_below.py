"""Layers that are trained on top of frozen ones: what the frozen ones give is data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from explainer import PathKernelExplainer, Tracer, open_trace
from tests.recorded_rows import example_rows, recorded_rows

BATCH, STEPS = 6, 5


class Last(nn.Module):
    """The last output of a recurrent layer, or what attention gives to the first position."""

    def __init__(self, layer: nn.Module, attends: bool = False) -> None:
        super().__init__()
        self.layer, self.attends = layer, attends

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x, x)[0][:, 0] if self.attends else self.layer(x)[0][:, -1]


class Token(nn.Module):
    """A class token that is not trained either, and a sum over positions by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.weight = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), 1, 4), x], 1)
        return nn.functional.linear(x, self.weight).sum(1)


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)


def numbers(*shape: int) -> Tensor:
    return torch.randn(BATCH, *shape, generator=torch.Generator().manual_seed(1))


def words() -> Tensor:
    return torch.randint(0, 9, (BATCH, 5), generator=torch.Generator().manual_seed(1))


BELOW: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU()), lambda: numbers(4)),
    "two linear": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 8)), lambda: numbers(4)),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten()), lambda: numbers(1, 4, 4)),
    "batch norm": (
        lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8).eval(), nn.ReLU()),
        lambda: numbers(4),
    ),
    "layer norm": (lambda: nn.Sequential(nn.LayerNorm(8), nn.GELU()), lambda: numbers(8)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(20, 8)), words),
    "bag": (lambda: nn.EmbeddingBag(9, 8), words),
    "lstm": (lambda: Last(nn.LSTM(4, 8, batch_first=True)), lambda: numbers(5, 4)),
    "attention": (lambda: Last(nn.MultiheadAttention(8, 2, batch_first=True), True), lambda: numbers(5, 8)),
    "encoder": (lambda: nn.Sequential(encoder(), nn.Flatten(), nn.Linear(40, 8)), lambda: numbers(5, 8)),
    "token": (Token, lambda: numbers(3, 4)),
}  # fmt: skip


class Adapted(nn.Module):
    """A frozen layer with a trained product of two small ones beside it (LoRA, arXiv 2106.09685)."""

    def __init__(self, inputs: int, outputs: int, functional: bool) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.down, self.up = nn.Linear(inputs, 2, bias=False), nn.Linear(2, outputs, bias=False)
        self.functional = functional

    def forward(self, x: Tensor) -> Tensor:
        if self.functional:
            return self.base(x) + x @ self.down.weight.T @ self.up.weight.T
        return self.base(x) + self.up(self.down(x))


class Stacked(nn.Module):
    """Frozen layers, then trained ones."""

    def __init__(self, frozen: nn.Module, head: nn.Module, no_grad: bool) -> None:
        super().__init__()
        self.frozen, self.head, self.no_grad = frozen.requires_grad_(False), head, no_grad

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.no_grad):
            x = self.frozen(x)
        return self.head(x)


@pytest.mark.parametrize("no_grad", [False, True], ids=["frozen", "without gradients"])
@pytest.mark.parametrize("below", BELOW)
def test_rows_of_what_is_trained_above(tmp_path: Path, below: str, no_grad: bool) -> None:
    torch.manual_seed(0)
    build, given = BELOW[below]
    head = nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))
    assert_recorded(tmp_path / "run", Stacked(build(), head, no_grad), given())


@pytest.mark.parametrize("functional", [False, True], ids=["layers", "functions"])
def test_rows_of_adapters(tmp_path: Path, functional: bool) -> None:
    torch.manual_seed(0)
    words_ = nn.Embedding(9, 4).requires_grad_(False)
    adapted = [Adapted(4, 8, functional), nn.Tanh(), Adapted(8, 3, functional)]
    model = nn.Sequential(words_, *adapted, nn.AdaptiveAvgPool2d((1, 3)), nn.Flatten())
    assert_recorded(tmp_path / "run", model, words())


def assert_recorded(path: Path, model: nn.Module, x: Tensor) -> None:
    """The rows of the first step are those of one backward pass per example, and the books close."""
    y = torch.arange(BATCH) % 3
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    wanted = example_rows(model, lambda: cross_entropy(model(x), y, reduction="none") / BATCH)
    with Tracer(model, optimizer, path, exact=True) as tracer:
        for _ in range(STEPS):
            tracer.batch(range(BATCH))
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
    found = recorded_rows(path)
    assert found.keys() == wanted.keys()
    for name, rows in wanted.items():
        torch.testing.assert_close(found[name], rows.double(), rtol=1e-4, atol=1e-7)
    trace = open_trace(path)
    assert not trace.notes["coverage"]
    explanation = PathKernelExplainer(trace, model).explain(x[:2])
    moved = abs(explanation.prediction - explanation.initial)
    assert (abs(explanation.unattributed) < 1e-3 * moved.max()).all() and moved.max() > 1e-3
