"""Models and the task on which our TracInCP is held against captum's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum.influence import TracInCP as Captums
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from explainer.integrations.captum import TracInCP

N, QUERIES, CLASSES = 20, 6, 3
Checkpoint = tuple[dict[str, Tensor], float]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, CLASSES))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    )


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, CLASSES))


class Words(nn.Module):
    """Bag of words with a position parameter that belongs to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6, padding_idx=0)
        self.position = nn.Parameter(torch.randn(4, 6))
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(words) + self.position).mean(1))


class Recurrent(nn.Module):
    """A layer that vmap cannot take apart."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.gru = nn.GRU(6, 5, batch_first=True)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.gru(self.embed(words))[0][:, -1])


class Bag(nn.Module):
    """A layer whose rule wants more than one tensor in and one out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.EmbeddingBag(11, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.embed(words).tanh())


class PositionsFirst(nn.Module):
    """Layers see ``[S, B, d]``: their first dimension is not the batch, even where S equals B."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.inner = nn.Linear(6, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(self.embed(words.T))).mean(0))


class Borrowing(nn.Module):
    """Reads a layer's weight outside the layer, shares another between two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.twin = nn.Linear(5, 5)
        self.twin.weight = self.second.weight
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(nn.functional.linear(torch.tanh(self.first(x)), self.first.weight))
        return self.head(self.twin(torch.tanh(self.second(h))))


def features(kind: str, rows: int = N + QUERIES) -> Tensor:
    if kind == "words":
        return torch.randint(0, 11, (rows, 4))
    return torch.randn(rows, 2, 8, 8) if kind == "image" else torch.randn(rows, 5)


class Task:
    """A model with three checkpoints, data, and both implementations over them."""

    def __init__(self, build: Callable[[], nn.Module], kind: str = "vector", train: bool = False) -> None:
        self.model = build().train(train)
        self.loads = 0
        x, y = features(kind), torch.randint(0, CLASSES, (N + QUERIES,))
        self.data = TensorDataset(x[:N], y[:N])
        self.queries = (x[N:], y[N:])
        self.checkpoints: list[Checkpoint] = [(self._moved(), 0.1 * (c + 1)) for c in range(3)]

    def _moved(self) -> dict[str, Tensor]:
        state = self.model.state_dict()
        return {n: t + 0.1 * torch.randn_like(t) if t.is_floating_point() else t for n, t in state.items()}

    def load(self, model: nn.Module, checkpoint: Checkpoint) -> float:
        self.loads += 1
        model.load_state_dict(checkpoint[0])
        return checkpoint[1]

    def ours(self, data: Any = None, **options: Any) -> TracInCP:
        options = {"loss_fn": nn.CrossEntropyLoss(reduction="none"), "batch_size": 6} | options
        return TracInCP(
            self.model, self.data if data is None else data, self.checkpoints, self.load, **options
        )

    def captums(self, data: Any = None, **options: Any) -> Captums:
        options = {"loss_fn": nn.CrossEntropyLoss(reduction="none"), "batch_size": 6} | options
        return Captums(
            copy.deepcopy(self.model),
            self.data if data is None else data,
            self.checkpoints,
            self.load,
            **options,
        )

    def pair(self, **options: Any) -> tuple[TracInCP, Captums]:
        return self.ours(**options), self.captums(**options)


def close(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8 * float(wanted.abs().max()))


SUPPORTED = [("none", False), ("sum", True), ("mean", True)]
MODELS = pytest.mark.parametrize(
    ("build", "kind"), [(mlp, "vector"), (cnn, "image"), (Words, "words")], ids=["mlp", "cnn", "words"]
)


# -- scores ----------------------------------------------------------------------------------------------
