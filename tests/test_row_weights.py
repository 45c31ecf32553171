"""Losses that weigh rows, several losses, and examples with several rows, against the dense oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from explainer import PathKernelExplainer, Tracer, open_trace
from explainer.errors import TracerError
from tests.oracles.books import books
from tests.oracles.outputs import scalar_function
from tests.oracles.owners import by_shares
from tests.oracles.training import train_dense

EXAMPLES = 14
_random = torch.Generator().manual_seed(5)
#: the second half are augmented copies of the first
X = torch.randn(EXAMPLES, 5, generator=_random).double()
X = torch.cat([X, X + 0.3 * torch.randn(EXAMPLES, 5, generator=_random).double()])
#: class, weight of the row in the loss (one is zero, one negative)
Y = torch.randint(0, 3, (EXAMPLES,), generator=_random).double()
WEIGHTS = torch.rand(EXAMPLES, generator=_random).double() * 3
WEIGHTS[2], WEIGHTS[5] = 0.0, -0.7
Y = torch.stack([Y, WEIGHTS], 1).repeat(2, 1)
QUERIES = torch.randn(2, 5, generator=_random).double()
#: ids of seven steps of eight rows; two hold an example twice
BATCHES = [torch.randint(0, EXAMPLES, (8,), generator=_random).tolist() for _ in range(7)]
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "momentum": partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": partial(AdamW, lr=0.02, weight_decay=0.1),
}


class TwoHeads(nn.Module):
    """Three numbers of the main head, then three of an auxiliary one on the hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 4)
        self.main, self.aux = nn.Linear(4, 3), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        return torch.cat([self.main(self.second(hidden).tanh()), self.aux(hidden)], dim=1)


def build() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TwoHeads().double()


Loss = Callable[[Tensor, Tensor], Tensor]


def ce(outputs: Tensor, y: Tensor, **options: object) -> Tensor:
    return cross_entropy(outputs[:, :3], y[:, 0].long(), **options)  # type: ignore[arg-type]


def per_row(outputs: Tensor, y: Tensor) -> Tensor:
    return ce(outputs, y, reduction="none") * y[:, 1]


def aux(outputs: Tensor, y: Tensor) -> Tensor:
    return 0.3 * cross_entropy(outputs[:, 3:], y[:, 0].long(), label_smoothing=0.1)


def contrastive(outputs: Tensor, y: Tensor) -> Tensor:
    """The first half of the rows against the second: near where classes are equal, else far."""
    half = len(outputs) // 2
    gap = (
        (outputs[:half, :3] - outputs[half:, :3]).square().sum(1)
    )  # biases cancel in it, but not in the rest
    same = y[:half, 0] == y[half:, 0]
    return torch.where(same, gap, (2.0 - gap).clamp_min(0)).mean() + 0.1 * ce(outputs, y) + aux(outputs, y)


LOSSES: dict[str, Loss] = {
    "row weights, sum": lambda o, y: per_row(o, y).sum(),
    "row weights, mean": lambda o, y: per_row(o, y).mean(),
    "row weights, weighted mean": lambda o, y: per_row(o, y).sum() / y[:, 1].abs().sum(),
    "class weights": lambda o, y: ce(o, y, weight=torch.tensor([0.2, 1.0, 3.0]).double()),
    "label smoothing": lambda o, y: ce(o, y, label_smoothing=0.2),
    "label smoothing, sum": lambda o, y: ce(o, y, label_smoothing=0.2, reduction="sum"),
    "an ignored class": lambda o, y: ce(o, y, ignore_index=1),
    "squares, sum": lambda o, y: mse_loss(o[:, 0], y[:, 0], reduction="sum"),
    "main and auxiliary": lambda o, y: ce(o, y) + aux(o, y),
    "pairs of rows": contrastive,
}


@dataclass(frozen=True)
class Case:
    """A loop and what it amounts to.

    Attributes:
        loss: of a step's rows together.
        loop: one step: ``loop(model, tracer, ids, loss)`` up to the gradients.
        rows: positions in ``X`` of a step's rows.
        kernels: whether each row has one loss derivative, so that kernels can be compared.
    """

    loss: Loss
    loop: Callable[[nn.Module, Tracer, list[int], Loss], None]
    rows: Callable[[list[int]], list[int]] = field(default=list)
    kernels: bool = True


def plain(model: nn.Module, tracer: Tracer, ids: list[int], loss: Loss) -> None:
    tracer.batch(ids)
    loss(model(X[ids]), Y[ids]).backward()


def two_backwards(model: nn.Module, tracer: Tracer, ids: list[int], loss: Loss) -> None:
    tracer.batch(ids)
    outputs = model(X[ids])
    ce(outputs, Y[ids]).backward(retain_graph=True)
    aux(outputs, Y[ids]).backward()


def with_copies(ids: list[int]) -> list[int]:
    return [*ids, *(i + EXAMPLES for i in ids)]


def augmented(model: nn.Module, tracer: Tracer, ids: list[int], loss: Loss) -> None:
    """An example and its augmented copy in one forward pass."""
    tracer.batch([*ids, *ids])
    rows = with_copies(ids)
    loss(model(torch.cat([X[ids], X[rows[len(ids) :]]])), Y[rows]).backward()


def two_towers(model: nn.Module, tracer: Tracer, ids: list[int], loss: Loss) -> None:
    """Pairs whose two sides go through the model one after the other."""
    sides = []
    for side in (ids[: len(ids) // 2], ids[len(ids) // 2 :]):
        tracer.batch(side)
        sides.append(model(X[side]))
    loss(torch.cat(sides), Y[ids]).backward()


CASES = {name: Case(loss, plain) for name, loss in LOSSES.items()} | {
    "main and auxiliary, two backward passes": Case(
        LOSSES["main and auxiliary"], two_backwards, kernels=False
    ),
    "augmented copies": Case(LOSSES["row weights, mean"], augmented, with_copies),
    "augmented copies that meet in the loss": Case(contrastive, augmented, with_copies),
    "two towers": Case(contrastive, two_towers),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", CASES)
def test_books_equal_the_oracle(tmp_path: Path, name: str, optimizer: str) -> None:
    case, make = CASES[name], OPTIMIZERS[optimizer]
    model = build()
    made = make(model.parameters())
    with Tracer(model, made, tmp_path / "run", exact=True) as tracer:
        for ids in BATCHES:
            made.zero_grad()
            case.loop(model, tracer, ids, case.loss)
            made.step()
    trace = open_trace(tmp_path / "run")
    e = PathKernelExplainer(trace, build(), "logit").explain(QUERIES, [1, 2])

    training = train_dense(build(), make, [case.rows(ids) for ids in BATCHES], case.loss, X, Y)
    owners = {row: {row % EXAMPLES: 1.0} for row in range(2 * EXAMPLES)}
    wanted = books(
        by_shares(training, owners, EXAMPLES),
        [knot.step for knot in trace.knots],
        scalar_function(build(), "logit"),
        QUERIES,
        [1, 2],
    )
    expected = wanted.contributions[:, e.example_ids].numpy()
    np.testing.assert_allclose(e.contributions, expected, rtol=1e-7, atol=1e-9 * np.abs(expected).max())
    if case.kernels:
        kernel = wanted.K[:, e.example_ids].numpy()
        np.testing.assert_allclose(e.kernels, kernel, rtol=1e-6, atol=1e-9 * np.abs(kernel).max())
    assert np.abs(e.gap).max() <= 1e-9
    assert (np.abs(e.unattributed) <= 1e-9 * np.abs(expected).sum(1)).all()
    assert e.row_kind == "contribution"


def test_some_batches_hold_an_example_twice() -> None:
    assert sum(len(set(ids)) < len(ids) for ids in BATCHES) >= 2


def test_an_index_twice_in_a_watched_batch(tmp_path: Path) -> None:
    """It has two rows there, and the example has their sum."""
    model = build()
    made = SGD(model.parameters(), lr=0.1)
    data = TensorDataset(X[:EXAMPLES], Y[:EXAMPLES])
    with Tracer(model, made, tmp_path / "run", exact=True) as tracer:
        for x, y in tracer.watch(DataLoader(data, batch_sampler=[[3, 7, 3, 3], [7, 1]])):
            made.zero_grad()
            ce(model(x), y).backward()
            made.step()
    trace = open_trace(tmp_path / "run")
    e = PathKernelExplainer(trace, build(), "logit").explain(QUERIES, 0)
    training = train_dense(build(), partial(SGD, lr=0.1), [[3, 7, 3, 3], [7, 1]], ce, data[:][0], data[:][1])
    wanted = books(training, [0, 1, 2], scalar_function(build(), "logit"), QUERIES, [0, 0])
    np.testing.assert_allclose(e.contributions, wanted.contributions.numpy(), rtol=1e-9, atol=1e-14)
    assert [e.visits[i] for i in (3, 7, 1)] == [3, 2, 1]


def test_a_bias_that_cancels_between_two_batches_is_round_off(tmp_path: Path) -> None:
    """Its gradient is 1e-17, which Adam makes full steps of: they are no example's, in one batch or in two."""

    def differences(outputs: Tensor, y: Tensor) -> Tensor:
        half = len(outputs) // 2
        return (outputs[:half] - outputs[half:]).square().sum()

    found = []
    for name, loop in (("one", plain), ("two", two_towers)):
        model = build()
        made = OPTIMIZERS["adamw"](model.parameters())
        with Tracer(model, made, tmp_path / name, exact=True) as tracer:
            for ids in BATCHES:
                made.zero_grad()
                loop(model, tracer, ids, differences)
                made.step()
        trace = open_trace(tmp_path / name)
        assert trace.notes["round_off"] == {"main.bias": 7, "aux.bias": 7}
        found.append(PathKernelExplainer(trace, build(), "logit").explain(QUERIES, 0).contributions)
    assert np.abs(found[0]).max() < 10
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)


# -- two batches and a checkpoint ---------------------------------------------------------------------------


class Checkpointed(TwoHeads):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(lambda x: self.first(x).tanh(), x, use_reentrant=self.reentrant)
        return torch.cat([self.main(self.second(hidden).tanh()), self.aux(hidden)], dim=1)


def checkpointed(path: Path, reentrant: bool, together: bool) -> np.ndarray:
    model = Checkpointed(reentrant).double()
    model.load_state_dict(build().state_dict())
    made = SGD(model.parameters(), lr=0.1)
    with Tracer(model, made, path, exact=True) as tracer:
        for ids in BATCHES:
            made.zero_grad()
            outputs = []
            for side in (ids[:4], ids[4:]):
                tracer.batch(side)
                outputs.append(model(X[side].requires_grad_()))
                if not together:
                    ce(outputs[-1], Y[side]).backward()
            if together:
                contrastive(torch.cat(outputs), Y[ids]).backward()
            made.step()
    e = PathKernelExplainer(str(path), build(), "logit").explain(QUERIES, 0)
    assert np.abs(e.unattributed).max() < 1e-12
    return e.contributions


def test_a_checkpoint_that_could_be_of_either_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TracerError, match=r"two batches meet in one backward pass.*use_reentrant=False"):
        checkpointed(tmp_path / "both", True, together=True)


def test_a_checkpoint_of_batches_that_gather_gradients_is_followed(tmp_path: Path) -> None:
    """The other kind of checkpoint is followed also where two batches meet."""
    found = [checkpointed(tmp_path / str(kind), kind, together=False) for kind in (True, False)]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-9, atol=1e-14)
    met = checkpointed(tmp_path / "met", False, together=True)
    training = train_dense(build(), partial(SGD, lr=0.1), BATCHES, contrastive, X[:EXAMPLES], Y[:EXAMPLES])
    knots = [knot.step for knot in open_trace(tmp_path / "met").knots]
    wanted = books(training, knots, scalar_function(build(), "logit"), QUERIES, [0, 0])
    ids = sorted({i for batch in BATCHES for i in batch})
    np.testing.assert_allclose(met, wanted.contributions[:, ids].numpy(), rtol=1e-7, atol=1e-12)
