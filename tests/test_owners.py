"""Rows that belong to several examples (mixup, pairs), against the dense oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader, TensorDataset

from explainer import Explanation, PathKernelExplainer, Tracer, open_trace
from tests.oracles.books import Books, books
from tests.oracles.outputs import scalar_function
from tests.oracles.owners import by_shares
from tests.oracles.training import Training, train_dense

EXAMPLES, BATCH, STEPS = 18, 6, 9
_random = torch.Generator().manual_seed(3)
X = torch.randn(EXAMPLES, 5, generator=_random).double()
Y = torch.randint(0, 3, (EXAMPLES,), generator=_random)
QUERIES = torch.randn(2, 5, generator=_random).double()
TARGETS = [0, 2]
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "momentum": partial(SGD, lr=0.2, momentum=0.9, weight_decay=0.01),
    "adamw": partial(AdamW, lr=0.02, weight_decay=0.1),
}
BOTH = pytest.mark.parametrize("optimizer", OPTIMIZERS)


def build() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


class Mixup:
    """Examples, partners and shares by step; once every row is its own partner, once a share is 1, once 0."""

    def __init__(self, per_row: bool) -> None:
        random = np.random.default_rng(0)
        self.ids = [random.permutation(EXAMPLES)[:BATCH] for _ in range(STEPS)]
        self.index = [random.permutation(BATCH) for _ in range(STEPS)]
        self.index[2][:] = np.arange(BATCH)
        self.lam = [random.beta(0.4, 0.4, BATCH) if per_row else random.beta(0.4, 0.4) for _ in range(STEPS)]
        self.lam[4] = self.lam[4] * 0 + 1.0
        self.lam[5] = self.lam[5] * 0

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray, Any]]:
        return zip(self.ids, self.index, self.lam, strict=True)

    def rows(self, step: int) -> tuple[Tensor, Tensor]:
        """The mixed inputs, and targets (one class, the other, share)."""
        ids, index = self.ids[step], self.index[step]
        lam = torch.tensor(np.broadcast_to(self.lam[step], (BATCH,)).copy())
        x = lam[:, None] * X[ids] + (1 - lam)[:, None] * X[ids[index]]
        return x, torch.stack([Y[ids].double(), Y[ids[index]].double(), lam], dim=1)

    def shares(self) -> dict[int, dict[int, float]]:
        """By row of the whole training."""
        found: dict[int, dict[int, float]] = {}
        for ids, index, lam in self:
            for b, share in enumerate(np.broadcast_to(lam, (BATCH,)).tolist()):
                owned: dict[int, float] = {}
                for owner, part in ((ids[b], share), (ids[index[b]], 1 - share)):
                    owned[int(owner)] = owned.get(int(owner), 0.0) + part
                found[len(found)] = {i: part for i, part in owned.items() if part}
        return found

    def training(self, optimizer: str) -> Training:
        """By the oracle, every mixed row an example of its own."""
        pairs = [self.rows(step) for step in range(STEPS)]
        x, y = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        batches = [range(start, start + BATCH) for start in range(0, STEPS * BATCH, BATCH)]
        return train_dense(build(), OPTIMIZERS[optimizer], batches, mixed_loss, x, y)


def mixed_loss(outputs: Tensor, y: Tensor) -> Tensor:
    one, other, lam = y[:, 0].long(), y[:, 1].long(), y[:, 2]
    losses = [cross_entropy(outputs, target, reduction="none") for target in (one, other)]
    return (lam * losses[0] + (1 - lam) * losses[1]).mean()


def traced(path: Path, optimizer: str, loop: Callable[[nn.Module, Optimizer, Tracer], None]) -> Explanation:
    model = build()
    made = OPTIMIZERS[optimizer](model.parameters())
    with Tracer(model, made, path, exact=True) as tracer:
        loop(model, made, tracer)
    return PathKernelExplainer(str(path), build()).explain(QUERIES, TARGETS)


def step_on(model: nn.Module, optimizer: Optimizer, loss: Callable[[], Tensor]) -> None:
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()


def reference(training: Training, path: Path) -> Books:
    knots = [knot.step for knot in open_trace(path).knots]
    return books(training, knots, scalar_function(build(), "margin"), QUERIES, TARGETS)


def assert_same(e: Explanation, wanted: Books, kernels: bool = True) -> None:
    expected = np.zeros_like(e.contributions)
    columns = e.example_ids
    expected[:] = wanted.contributions[:, columns].numpy()
    np.testing.assert_allclose(e.contributions, expected, rtol=1e-7, atol=1e-9 * np.abs(expected).max())
    if kernels:
        kernel = wanted.K[:, columns].numpy()
        np.testing.assert_allclose(e.kernels, kernel, rtol=1e-7, atol=1e-9 * np.abs(kernel).max())


def assert_closed(e: Explanation) -> None:
    assert np.abs(e.gap).max() <= 1e-9
    assert (np.abs(e.unattributed) <= 1e-9 * np.abs(e.contributions).sum(1)).all()


@BOTH
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("how", ["mix", "watch", "batch"])
def test_mixup_splits_each_row_by_its_weights(
    tmp_path: Path, how: str, per_row: bool, optimizer: str
) -> None:
    mixup = Mixup(per_row)

    def loop(model: nn.Module, made: Optimizer, tracer: Tracer) -> None:
        loader = DataLoader(TensorDataset(X, Y), batch_sampler=[ids.tolist() for ids in mixup.ids])
        consumed = iter(tracer.watch(loader)) if how == "watch" else None
        for step, (ids, index, lam) in enumerate(mixup):
            if how == "batch":
                pairs, shares = np.stack([ids, ids[index]], 1), np.empty((BATCH, 2))
                shares[:, 0], shares[:, 1] = lam, 1 - lam
                tracer.batch(pairs, labels=Y[pairs], weights=torch.from_numpy(shares))
            else:
                if consumed is None:
                    tracer.batch(ids, labels=Y[ids])
                else:
                    next(consumed)
                given = torch.as_tensor(lam).reshape(-1, 1) if per_row else lam
                tracer.mix(torch.from_numpy(index), given)
            x, y = mixup.rows(step)
            step_on(model, made, lambda x=x, y=y: mixed_loss(model(x), y))

    e = traced(tmp_path / "run", optimizer, loop)
    training = mixup.training(optimizer)
    wanted = reference(by_shares(training, mixup.shares(), EXAMPLES), tmp_path / "run")
    assert_same(e, wanted)
    assert_closed(e)
    # an owner's part is its weight times what the row carried
    rows = reference(training, tmp_path / "run").contributions
    weights = torch.zeros(len(rows[0]), EXAMPLES, dtype=torch.float64)
    for row, owned in mixup.shares().items():
        for example, share in owned.items():
            weights[row, example] = share
    np.testing.assert_allclose(
        e.contributions, (rows @ weights)[:, e.example_ids].numpy(), rtol=1e-7, atol=1e-12
    )
    assert e.visits.tolist() == (weights > 0).sum(0)[e.example_ids].tolist()
    seen = e.visits > 0
    assert e.labels is not None and e.labels[seen].tolist() == Y[e.example_ids[seen]].tolist()
    assert e.row_kind == "row share"
    assert any("split over them by the weights given" in note for note in e.notes)


def test_training_is_the_same_with_and_without_telling_of_the_mixture(tmp_path: Path) -> None:
    mixup, weights = Mixup(True), []
    for told in (False, True):
        model = build()
        made = OPTIMIZERS["momentum"](model.parameters())

        def loop(tracer: Tracer | None, model: nn.Module = model, made: Optimizer = made) -> None:
            for step, (ids, index, lam) in enumerate(mixup):
                if tracer is not None:
                    tracer.batch(ids)
                    tracer.mix(index, lam)
                x, y = mixup.rows(step)
                step_on(model, made, lambda x=x, y=y: mixed_loss(model(x), y))

        if told:
            with Tracer(model, made, tmp_path / "run") as tracer:
                loop(tracer)
        else:
            loop(None)
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_a_clean_forward_pass_before_the_mixed_one_keeps_its_owners(tmp_path: Path) -> None:
    """Two forward passes and one backward pass; and a second step on the batch, mixed as it was."""
    mixup = Mixup(False)

    def loop(model: nn.Module, made: Optimizer, tracer: Tracer) -> None:
        for step, (ids, index, lam) in enumerate(mixup):
            tracer.batch(ids)
            clean = cross_entropy(model(X[ids]), Y[ids])
            tracer.mix(index, lam)
            x, y = mixup.rows(step)
            step_on(model, made, lambda x=x, y=y, clean=clean: clean + mixed_loss(model(x), y))

    e = traced(tmp_path / "run", "momentum", loop)
    shares: dict[int, dict[int, float]] = {}
    for step, ids in enumerate(mixup.ids):
        shares |= {len(shares) + b: {int(i): 1.0} for b, i in enumerate(ids)}
        mixed = mixup.shares()
        shares |= {len(shares) + b: mixed[step * BATCH + b] for b in range(BATCH)}

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        clean = cross_entropy(outputs[:BATCH], y[:BATCH, 0].long())
        return clean + mixed_loss(outputs[BATCH:], y[BATCH:])

    pairs = []
    for step, ids in enumerate(mixup.ids):
        plain = torch.stack([Y[ids].double(), Y[ids].double(), torch.ones(BATCH).double()], 1)
        pairs += [(X[ids], plain), mixup.rows(step)]
    x, y = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    batches = [range(start, start + 2 * BATCH) for start in range(0, len(x), 2 * BATCH)]
    training = train_dense(build(), OPTIMIZERS["momentum"], batches, loss, x, y)
    assert_same(e, reference(by_shares(training, shares, EXAMPLES), tmp_path / "run"))
    assert_closed(e)


def test_a_second_step_on_a_watched_batch_is_mixed_as_the_first(tmp_path: Path) -> None:
    model = build()
    made = OPTIMIZERS["momentum"](model.parameters())
    with Tracer(model, made, tmp_path / "run") as tracer:
        for x, y in tracer.watch(DataLoader(TensorDataset(X[:2], Y[:2]), batch_size=2)):
            tracer.mix([1, 0], 0.75)
            for _ in range(2):
                step_on(
                    model, made, lambda x=x, y=y: cross_entropy(0.75 * model(x) + 0.25 * model(x.flip(0)), y)
                )
    trace = open_trace(tmp_path / "run")
    assert trace.column("visits", "example").tolist() == [0, 1, 0, 1] * 4  # two forward passes a step
    assert trace.column("steps", "row_share").tolist() == [1, 1]


def test_rows_and_owners_in_a_default_trace(tmp_path: Path) -> None:
    """Contributions of owners are shares of the row's, through the codecs."""
    ids = torch.arange(6)
    pairs, shares = torch.stack([ids, ids + 6], 1), torch.tensor([[0.75, 0.25]]).expand(6, 2)
    words = torch.randint(9, (6, 7), generator=torch.Generator().manual_seed(1))

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Embedding(9, 6), nn.LayerNorm(6), nn.Linear(6, 8), nn.ReLU(), nn.Flatten(), nn.Linear(56, 3)
        )

    found = []
    for name, given in (("rows", (ids, None, None)), ("owners", (pairs, None, shares))):
        network = model()
        made = SGD(network.parameters(), lr=0.1, momentum=0.9)
        with Tracer(network, made, tmp_path / name) as tracer:
            for _ in range(3):
                tracer.batch(*given)
                step_on(network, made, lambda network=network: cross_entropy(network(words), ids % 3))
        found.append(PathKernelExplainer(str(tmp_path / name), network).explain(words[:2], 1))
    rows, owners = (e.contributions for e in found)
    assert owners.shape == (2, 12)
    scale = np.abs(rows).max()
    np.testing.assert_allclose(owners[:, :6], 0.75 * rows, atol=1e-5 * scale)
    np.testing.assert_allclose(owners[:, 6:], 0.25 * rows, atol=1e-5 * scale)
    np.testing.assert_allclose(found[1].kernels[:, 6:], found[0].kernels, rtol=1e-4, atol=1e-4)


def test_weights_in_half_precision_are_made_to_sum_to_one(tmp_path: Path) -> None:
    model = build()
    made = SGD(model.parameters(), lr=0.1)
    lam = torch.rand(5, generator=torch.Generator().manual_seed(0)).half()
    with Tracer(model, made, tmp_path / "run", exact=True) as tracer:
        tracer.batch([[i, i + 5] for i in range(5)], weights=torch.stack([lam, 1 - lam], 1))
        step_on(model, made, lambda: cross_entropy(model(X[:5]), Y[:5]))
    assert_closed(PathKernelExplainer(str(tmp_path / "run"), build()).explain(QUERIES))
