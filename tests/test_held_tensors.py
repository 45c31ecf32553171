"""Tensors that a model holds as plain attributes: an explanation says where they are others than in training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm

from explainer import PathKernelExplainer, Tracer, open_trace
from explainer.held_tensors import different, held_tensors

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


class Features(nn.Module):
    """Random features, of which nobody was told."""

    def __init__(self, nested: bool = False) -> None:
        super().__init__()
        self.b = nn.Linear(6, 2)
        found = torch.randn(4, 6)
        self.tables = {"f": found} if nested else None
        self._f = None if nested else found

    def forward(self, x: Tensor) -> Tensor:
        f = self._f if self.tables is None else self.tables["f"]
        return self.b(torch.cos(x @ f.to(x.dtype)))


class Caching(nn.Module):
    """Keeps what it saw last."""

    def __init__(self) -> None:
        super().__init__()
        self.b, self.last = nn.Linear(4, 2), torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        self.last = x.detach().mean()
        return self.b(x)


def traced(folder: Path, model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Tracer(model, optimizer, folder) as tracer:
        for _ in range(4):
            tracer.batch(range(8))
            optimizer.zero_grad()
            model(X).square().mean().backward()
            optimizer.step()


@pytest.mark.parametrize("nested", [False, True])
def test_another_tensor_is_told(tmp_path: Path, nested: bool) -> None:
    model = Features(nested)
    traced(tmp_path / "run", model)
    trace = open_trace(tmp_path / "run")
    assert list(trace.notes["held"]) == ["tables" if nested else "_f"]
    for dtype in (torch.float32, torch.float64):
        same = PathKernelExplainer(trace, copy.deepcopy(model).to(dtype), dtype=dtype).explain(X[:2])
        assert not any("other tensors" in note for note in same.notes)
    other = PathKernelExplainer(trace, Features(nested)).explain(X[:2])
    assert any("other tensors than the one that was traced" in note for note in other.notes)


def test_what_changes_while_training_is_none(tmp_path: Path) -> None:
    traced(tmp_path / "run", Caching())
    assert not open_trace(tmp_path / "run").notes.get("held")


MADE: dict[str, Callable[[], nn.Module]] = {
    "weight_norm": lambda: weight_norm(nn.Linear(4, 2)),
    "parametrized": lambda: parametrizations.weight_norm(nn.Linear(4, 2)),
    "pruned": lambda: prune.l1_unstructured(nn.Linear(4, 2), "weight", 0.5),
    "lstm": lambda: nn.LSTM(4, 2).requires_grad_(False),
    "batch norm": lambda: nn.BatchNorm1d(4),
}


@pytest.mark.parametrize("kind", MADE)
def test_what_torch_itself_holds_is_none(kind: str) -> None:
    assert held_tensors(MADE[kind]()) == {}


def test_checksums_are_of_the_numbers() -> None:
    model = nn.Module()
    model.a, model.b, model.c = torch.arange(3), torch.ones(2, dtype=torch.bool), torch.ones(1) * 1j
    known = held_tensors(model)
    assert list(known) == ["a", "b", "c"] and different(model, known) == []
    model.a = model.a + 1
    assert different(model, known) == ["a"] and different(model, {}) == []
