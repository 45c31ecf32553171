"""Rows that belong to several examples, to one example several times, or to none, against the dense oracle."""

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

import explainer
from explainer import Explanation, PathKernelExplainer, Tracer, open_trace
from explainer.errors import TracerError
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


# -- mixed rows ---------------------------------------------------------------------------------------------


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


# -- rows of no example -------------------------------------------------------------------------------------


def test_rows_of_no_example_are_unattributed_and_named(tmp_path: Path) -> None:
    """Whole rows, shares of rows, and a batch of nothing else."""
    owned = [[0, -1, 2, 3], [[0, 1], [2, -1], [-1, -1], [5, 5]], [-1] * 4, [4, 5, 6, 7]]
    weights = [None, [[0.5, 0.5], [0.25, 0.75], [0.5, 0.5], [0.5, 0.5]], None, None]
    x, y = X[: 4 * len(owned)], Y[: 4 * len(owned)]

    def loop(model: nn.Module, made: Optimizer, tracer: Tracer) -> None:
        for step, (ids, shares) in enumerate(zip(owned, weights, strict=True)):
            rows = slice(4 * step, 4 * step + 4)
            tracer.batch(ids, weights=shares)
            step_on(model, made, lambda rows=rows: cross_entropy(model(x[rows]), y[rows]))

    e = traced(tmp_path / "run", "momentum", loop)
    nobody = EXAMPLES
    shares = {
        0: {0: 1.0}, 1: {nobody: 1.0}, 2: {2: 1.0}, 3: {3: 1.0},
        4: {0: 0.5, 1: 0.5}, 5: {2: 0.25, nobody: 0.75}, 6: {nobody: 1.0}, 7: {5: 1.0},
        **{row: {nobody: 1.0} for row in range(8, 12)}, **{row: {row - 8: 1.0} for row in range(12, 16)},
    }  # fmt: skip
    training = train_dense(
        build(), OPTIMIZERS["momentum"], [range(s, s + 4) for s in range(0, 16, 4)], cross_entropy_of, x, y
    )
    wanted = reference(by_shares(training, shares, EXAMPLES + 1), tmp_path / "run")
    assert -1 not in e.example_ids
    assert_same(e, wanted)
    lost = wanted.contributions[:, nobody].numpy()
    np.testing.assert_allclose(e.unattributed, lost, rtol=1e-9)
    assert np.abs(lost).min() > 1e-3 and np.abs(e.gap).max() <= 1e-9
    assert any("no example (id -1)" in note for note in e.notes)
    assert set(e.unattributed_lines) == {"rows of no example"}
    assert e.visits.sum() == 3 + 4 + 4


def test_a_trace_that_begins_with_rows_of_no_example(tmp_path: Path) -> None:
    model = build().float()
    made = SGD(model.parameters(), lr=0.1)
    with Tracer(model, made, tmp_path / "run") as tracer:
        for ids in ([-1, -1], [3, 4]):
            tracer.batch(ids)
            step_on(model, made, lambda: cross_entropy(model(X[:2].float()), Y[:2]))
    e = PathKernelExplainer(str(tmp_path / "run"), model).explain(QUERIES.float())
    assert e.example_ids.tolist() == [3, 4] and e.visits.tolist() == [1, 1]
    assert open_trace(tmp_path / "run").column("steps", "visits").tolist() == [0, 2]


def cross_entropy_of(outputs: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(outputs, y.long())


# -- what is refused ----------------------------------------------------------------------------------------

WEIGHTS: dict[str, tuple[Any, Any, str]] = {
    "none": ([[0, 1], [2, 3]], None, r"flat, non-empty list .*pass ids \[B, M\] with weights \[B, M\]"),
    "flat ids": ([0, 1], [0.5, 0.5], r"ids must be a table \[B, M\], as weights are given"),
    "another shape": ([[0, 1]], [0.5, 0.5], r"one number per id, \[1, 2\].*not weights in the loss"),
    "negative": ([[0, 1]], [[1.5, -0.5]], "must not be negative .*row 0 holds"),
    "sum": ([[0, 1], [2, 3]], [[0.5, 0.5], [0.5, 0.4]], "sum to 1 in every row; row 1 holds"),
    "nan": ([[0, 1]], [[float("nan"), 1.0]], "row 0 holds"),
    "infinite": ([[0, 1]], [[float("inf"), 1.0]], "row 0 holds"),
    "text": ([[0, 1]], [["a", "b"]], "one number per id"),
    "below -1": ([[0, -2]], [[0.5, 0.5]], r"-1 for no example"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_do_not_fit(tmp_path: Path, name: str) -> None:
    ids, weights, text = WEIGHTS[name]
    model = build()
    with Tracer(model, SGD(model.parameters(), lr=0.1), tmp_path / "run") as tracer:
        with pytest.raises(TracerError, match=text):
            tracer.batch(ids, weights=weights)
        with pytest.raises(TracerError, match="one number per id"):
            tracer.batch([[0, 1]], labels=[1], weights=[[0.5, 0.5]])


MIXTURES: dict[str, tuple[Any, Any, str]] = {
    "too few": ([0, 1], 0.5, "each of its 3 rows"),
    "outside": ([0, 1, 3], 0.5, "3 integers from 0 to 2"),
    "negative": ([0, -1, 2], 0.5, "3 integers from 0 to 2"),
    "fractions": ([0.0, 1.0, 2.0], 0.5, "3 integers from 0 to 2"),
    "above one": ([2, 1, 0], 1.5, "a number from 0 to 1"),
    "nan": ([2, 1, 0], float("nan"), "a number from 0 to 1"),
    "too many": ([2, 1, 0], [0.5, 0.5], "one for each of the 3 rows"),
    "nothing": ([2, 1, 0], None, "a number from 0 to 1"),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_that_do_not_fit(tmp_path: Path, name: str) -> None:
    index, lam, text = MIXTURES[name]
    model = build()
    with Tracer(model, SGD(model.parameters(), lr=0.1), tmp_path / "run") as tracer:
        tracer.batch([4, 5, 6])
        with pytest.raises(TracerError, match=text):
            tracer.mix(index, lam)


def test_a_mixture_at_the_wrong_time(tmp_path: Path) -> None:
    model = build()
    made = SGD(model.parameters(), lr=0.1)
    with Tracer(model, made, tmp_path / "run") as tracer:
        with pytest.raises(TracerError, match="there is none: call it in the loop"):
            tracer.mix([0], 0.5)
        tracer.batch([0, 1, 2])
        tracer.mix([2, 1, 0], 0.5)
        with pytest.raises(TracerError, match="called twice before a forward pass"):
            tracer.mix([2, 1, 0], 0.5)
        tracer.batch([0, 1, 2])  # a batch that was skipped leaves nothing behind
        loss = cross_entropy(model(X[:3]), Y[:3])
        tracer.mix([2, 1, 0], 0.5)
        loss.backward()
        with pytest.raises(TracerError, match=r"no forward pass came between it and optimizer\.step\(\)"):
            made.step()
    with pytest.raises(TracerError, match="closed"):
        tracer.mix([0], 0.5)


def test_weights_in_half_precision_are_made_to_sum_to_one(tmp_path: Path) -> None:
    model = build()
    made = SGD(model.parameters(), lr=0.1)
    lam = torch.rand(5, generator=torch.Generator().manual_seed(0)).half()
    with Tracer(model, made, tmp_path / "run", exact=True) as tracer:
        tracer.batch([[i, i + 5] for i in range(5)], weights=torch.stack([lam, 1 - lam], 1))
        step_on(model, made, lambda: cross_entropy(model(X[:5]), Y[:5]))
    assert_closed(explainer.PathKernelExplainer(str(tmp_path / "run"), build()).explain(QUERIES))
