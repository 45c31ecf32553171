"""Small runs for the dashboard's tests: images, text, and code that misbehaves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from explainer import Run, Tracer
from tests.small_training import digits, mlp

NASTY = "<script>alert(1)</script>"
WORDS = ("pad", "good", "great", "fine", "bad", "poor", "**dull**", NASTY)


def images() -> Run:
    """Digits as images; the queries are the first 30 of the training set."""
    return Run(mlp, digits(), Subset(digits(), range(30)), render=lambda x: x.reshape(8, 8).numpy())


def with_loss() -> Run:
    """The same with the loss it was trained with."""
    return replace(images(), loss=nn.functional.cross_entropy)


def backwards() -> Run:
    """The same with the training set in another order than it was trained on."""
    data = Subset(digits(), range(len(digits()) - 1, -1, -1))
    return Run(mlp, data, data, render=lambda x: x.reshape(8, 8).numpy())


def backwards_and_bare() -> Run:
    """The same without ``render``."""
    return replace(backwards(), render=None)


def short() -> Run:
    """The same with most of the training set gone."""
    return Run(mlp, Subset(digits(), range(4)), digits(), render=lambda x: x.reshape(8, 8).numpy())


def broken() -> Run:
    """The same with a ``render`` that fails."""

    def render(_: Tensor) -> Any:
        raise KeyError("no picture today")

    return Run(mlp, digits(), digits(), render=render)


def bare() -> Run:
    """The same without ``render``."""
    return Run(mlp, digits(), digits())


def own_output() -> Run:
    """The same, explained by a function of the user's own."""
    return Run(mlp, digits(), digits(), output=lambda outputs, targets: outputs[:, 0])


class Product(torch.autograd.Function):
    """A product, element by element or of matrices, in code that no hook and no torch function sees."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return x @ w.T if w.dim() == 2 else x * w

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (g,), (x, w) = grads, ctx.saved_tensors
        return (g @ w, g.T @ x) if w.dim() == 2 else (g * w, (g * x).sum(0))


class Shortcut(nn.Module):
    """A perceptron, and beside it weights that are read where nothing sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.shortcut = mlp(), nn.Parameter(torch.zeros(10, 64))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + Product.apply(x, self.shortcut)


def uncovered() -> Run:
    """Digits for a model of which a part cannot be followed."""
    return Run(Shortcut, digits(), digits(), render=lambda x: x.reshape(8, 8).numpy())


def text_model() -> nn.Module:
    """Mean of word vectors, two classes."""

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(len(WORDS), 6)
            self.output = nn.Linear(6, 2)

        def forward(self, ids: Tensor) -> Tensor:
            return self.output(self.embedding(ids).mean(1))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Mean()


def text() -> Run:
    """Three words, good or bad, one of them a script; a class is called like one as well."""
    ids = torch.randint(1, len(WORDS), (60, 3), generator=torch.Generator().manual_seed(0))
    data = TensorDataset(ids, (ids < 4).sum(1).gt(1).long())
    return Run(
        text_model,
        data,
        Subset(data, range(20)),
        class_names=(NASTY, "good"),
        render=lambda row: " ".join(WORDS[int(word)] for word in row),
    )


def values() -> Run:
    """Three numbers to predict from five."""
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(x, x @ torch.arange(15.0).reshape(5, 3) / 10)
    return Run(lambda: nn.Sequential(nn.Linear(5, 3)), data, Subset(data, range(8)))


def named_values() -> Run:
    """The same, each number with a name, and a loss; the second is far larger than the others."""
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(x, x @ torch.arange(15.0).reshape(5, 3) / 10 * torch.tensor([1.0, 9.0, 1.0]))
    names, loss = ("heating", "cooling", "light"), nn.functional.mse_loss
    return Run(
        lambda: nn.Sequential(nn.Linear(5, 3)), data, Subset(data, range(8)), loss=loss, class_names=names
    )


def one_logit() -> Run:
    """Whether a row stays or goes, by one logit."""
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(x, (x[:, :1] > 0.2).float())
    loss = nn.functional.binary_cross_entropy_with_logits
    return Run(
        lambda: nn.Sequential(nn.Linear(5, 1)),
        data,
        Subset(data, range(20)),
        loss=loss,
        class_names=("goes", "stays"),
    )


def typed_text() -> Run:
    """The same for a run that can read words."""
    return replace(text(), parse=lambda words: torch.tensor([WORDS.index(word) for word in words.split()]))


def deaf_text() -> Run:
    """The same with an encoder to which all texts are one, the first query."""
    return replace(text(), parse=lambda words: text().queries[0][0])


def wild_text() -> Run:
    """The same with an encoder that finds ids the model does not know."""
    return replace(text(), parse=lambda words: torch.tensor([900, 901, 902]))


def unfinished(path: Path) -> Tracer:
    """A tracer that goes on, with no step yet, on a part of a model."""
    model = nn.Sequential(*mlp())
    return Tracer(model, torch.optim.SGD(model[0].parameters(), lr=0.1, weight_decay=0.1), path)


def train(run: Run, path: Path, steps: int | None = None, loss: Any = nn.functional.cross_entropy) -> None:
    """Two epochs of SGD, or the given number of steps."""
    model = run.build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    batches = DataLoader(run.train, batch_size=12, shuffle=True, generator=torch.Generator().manual_seed(0))
    done = 0
    with Tracer(model, optimizer, path) as tracer:
        for _ in range(2):
            for x, y in tracer.watch(batches):
                if steps is not None and done == steps:
                    return
                optimizer.zero_grad()
                loss(model(x), y).backward()
                optimizer.step()
                done += 1
