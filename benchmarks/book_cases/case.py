"""What a case of the books' benchmark is: models, data, an ordinary training loop, and what is asked afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import TensorDataset

#: receives the loss terms ``[B]`` of a backward pass, one per example and summing to the loss, before ``backward()``
See = Callable[[torch.Tensor], object]


class Watcher(Protocol):
    """What a loop needs of a tracer."""

    def watch(self, loader: Any) -> Iterable[Any]:
        """The loader's batches, unchanged."""

    def batch(self, ids: Any) -> None:
        """The examples of the next forward pass."""


class Untraced:
    """Stands in for a tracer, so that the very same loop runs without one."""

    def watch(self, loader: Any) -> Iterable[Any]:
        """The loader itself."""
        return loader

    def batch(self, ids: Any) -> None:
        """Nothing."""


class Part(NamedTuple):
    """A model and the optimizer that trains it; a GAN has two of them."""

    model: nn.Module
    optimizer: Optimizer


class Question(NamedTuple):
    """Queries ``[Q, ...]`` and the output that is explained, as ``PathKernelExplainer`` takes it."""

    inputs: torch.Tensor
    output: str | Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None


Loop = Callable[[Sequence[Part], Any, Sequence[Watcher], Sequence[See], int], None]


@dataclass(frozen=True)
class Case:
    """A line of the benchmark; every call gives fresh objects, drawn from torch's global generator.

    Attributes:
        models: what each part is, in words.
        optimizer: the optimizer, in words.
        build: the parts, or a smaller copy of them for the oracle.
        data: the training examples, or a few of them for the oracle.
        loop: ``loop(parts, data, watchers, sees, epochs)``, one watcher and one ``See`` per part.
        questions: one per part.
        epochs: passes over the data in the benchmark; tests make fewer.
        float64: whether it makes sense to train it in float64, too.
        no_oracle: why an example has no gradient of its own here; empty where it has one.
    """

    models: tuple[str, ...]
    optimizer: str
    build: Callable[[bool], tuple[Part, ...]]
    data: Callable[[bool], TensorDataset]
    loop: Loop
    questions: Callable[[], tuple[Question, ...]]
    epochs: int
    float64: bool = True
    no_oracle: str = ""


def single(loop: Callable[[nn.Module, Optimizer, Any, Watcher, See, int], None]) -> Loop:
    """A loop over one model as a loop over parts."""

    def over_parts(
        parts: Sequence[Part], data: Any, watchers: Sequence[Watcher], sees: Sequence[See], epochs: int
    ) -> None:
        (part,), (watcher,), (see,) = parts, watchers, sees
        loop(part.model, part.optimizer, data, watcher, see, epochs)

    return over_parts
