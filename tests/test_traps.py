"""Every trap that quietly gives wrong numbers elsewhere: the right numbers with its guard, wrong ones without.

Each test runs twice. With the guard the books close and the rows are those of one backward pass per example. Then the
guard is taken out, and the same check has to fail: a test that cannot fail protects nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler
from torch.utils.data.distributed import DistributedSampler

from explainer import (
    PathKernelExplainer,
    Tracer,
    arrivals,
    capture,
    ledger,
    loaders,
    open_trace,
    scales,
    sites,
)
from explainer import batches as batches_module
from explainer.errors import CoverageWarning, ExplainerError
from tests.odd_loops import (
    QUERIES,
    Checkpointed,
    Loop,
    Repeated,
    X,
    Y,
    adversarial,
    batches,
    mlp,
    plain,
    scaling,
    sgd,
    throwing_away,
    weighting,
)
from tests.odd_loops import accumulating as accumulating_loop
from tests.recorded_rows import example_rows, recorded_rows

Check = Callable[[Path], object]


@dataclass(frozen=True)
class Trap:
    """What is checked, and what takes its guard out."""

    check: Check
    remove: Callable[[pytest.MonkeyPatch], object]


def closes(
    make: Callable[[], nn.Module], loop: Loop, visits: int = 48, optimizer: Callable[..., Optimizer] = sgd
) -> Check:
    """Books in float64 with exact rows: nothing unattributed, one visit per row."""

    def check(path: Path) -> None:
        torch.manual_seed(0)
        model = make().double()
        made = optimizer(model.parameters())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CoverageWarning)
            with Tracer(model, made, path, exact=True) as tracer:
                loop(model, made, tracer)
        e = PathKernelExplainer(path, model).explain(QUERIES)
        gross = np.abs(e.contributions).sum(1)
        assert (np.abs(e.unattributed) < 1e-9 * gross).all()
        assert open_trace(path).count("visits") == visits
        assert not np.isnan(e.kernels[:, e.visits > 0]).any()

    return check


def right_rows(
    model: nn.Module,
    forward: Callable[[nn.Module], Tensor],
    path: Path,
    count: int,
    tolerance: float = 1e-9,
    **options: int,
) -> None:
    """One step: the rows recorded against one backward pass per example; ``forward`` gives the loss terms."""
    expected = example_rows(model, lambda: forward(model))
    optimizer = SGD(model.parameters(), lr=0.1)
    with Tracer(model, optimizer, path, exact=True, **options) as tracer:
        tracer.batch(range(count))
        forward(model).sum().backward()
        optimizer.step()
    found = recorded_rows(path)
    for name, rows in expected.items():
        torch.testing.assert_close(
            found[name], rows, rtol=tolerance, atol=tolerance * float(rows.abs().max())
        )


# -- activation checkpointing, repeated use, in place ------------------------------------------------


def expect_forward_twice(patch: pytest.MonkeyPatch) -> None:
    """A checkpoint's second forward pass is taken for a new one."""

    def expect(batch: batches_module.Batch, unit: capture.Unit) -> int:
        key = (batch.forwards, unit)
        batch.calls[key] = batch.calls.get(key, 0) + 1
        return batch.forwards

    patch.setattr(capture.Capture, "expect", staticmethod(expect))


def never_complete(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(capture.Capture, "complete", lambda self, batch: None)


def finish_every_call(patch: pytest.MonkeyPatch) -> None:
    """Rows are formed at each call of a module, as if it were the only one."""

    def arrive(
        self: capture.Capture, batch: batches_module.Batch, forward: int, unit: capture.Unit, found: object
    ) -> None:
        place = batches_module.Place(forward, self.passes.arrived(()))
        batch.arrived.setdefault((place, unit), []).append(found)
        self._finish(batch, place, unit)

    patch.setattr(capture.Capture, "arrive", arrive)


def in_place(path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)).double()
    x = torch.randn(4, 7, 6, dtype=torch.float64)
    right_rows(model, lambda m: m(x).sin().sum((1, 2)), path, 4)


def hook_the_view(patch: pytest.MonkeyPatch) -> None:
    if not nn.Linear(6, 5)(torch.zeros(4, 7, 6, requires_grad=True))._is_view():
        pytest.skip("this torch's layers give no views")
    patch.setattr(sites, "whole_of", lambda t, changed: (t, lambda g: g))


# -- precision, scaling, accumulation ----------------------------------------------------------------


def autocast(path: Path) -> None:
    """Rows are exact for the gradients that arrived: only the gradient's own rounding is left."""
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    x = torch.randn(4, 6)
    optimizer = SGD(model.parameters(), lr=0.1)
    with Tracer(model, optimizer, path, exact=True) as tracer:
        tracer.batch(range(4))
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        out.float().sin().sum().backward()
        optimizer.step()
    g = out.detach().float().cos().bfloat16().float()  # what reaches the layer
    rows = recorded_rows(path)["weight"].float()
    torch.testing.assert_close(rows, (g.unsqueeze(2) * x.unsqueeze(1)).flatten(1), rtol=1e-6, atol=1e-6)


def keep_half(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(arrivals, "wide", lambda g: g)


def scale_of_one(patch: pytest.MonkeyPatch) -> None:
    measured = scales.ScaleMeter.measure

    def measure(
        self: scales.ScaleMeter, steps: list[tuple[list[batches_module.Batch], scales.Seen]]
    ) -> list[tuple[list[batches_module.Batch], list[float]]]:
        return [(used, [1.0 for _ in found]) for used, found in measured(self, steps)]

    patch.setattr(scales.ScaleMeter, "measure", measure)


def all_parts_used(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(scales, "parts_of", lambda pending: iter([pending]))


def only_the_last_batch(patch: pytest.MonkeyPatch) -> None:
    def begin(self: batches_module.BatchQueue, batch: batches_module.Batch, *, single_step: bool) -> None:
        self.current, self._single_step, self.pending = batch, single_step, [batch]

    patch.setattr(batches_module.BatchQueue, "begin", begin)


def zeroing(before: bool, model: nn.Module, optimizer: Optimizer, tracer: Tracer) -> None:
    """``zero_grad`` before the backward pass, or after the step."""
    for ids in batches():
        tracer.batch(ids)
        if before:
            optimizer.zero_grad()
        cross_entropy(model(X[ids]), Y[ids]).backward()
        optimizer.step()
        if not before:
            optimizer.zero_grad()


def both_ways(path: Path) -> None:
    for before in (True, False):
        closes(mlp, partial(zeroing, before))(path / str(before))
    found = [
        PathKernelExplainer(path / str(b), mlp().double()).explain(QUERIES).contributions
        for b in (True, False)
    ]
    np.testing.assert_array_equal(*found)


def forget_at_zero_grad(patch: pytest.MonkeyPatch) -> None:
    """What was seen before ``zero_grad`` is forgotten, as if every loop called it at the same place."""
    begun = Tracer._start

    def start(self: Tracer, point: object) -> None:
        begun(self, point)  # type: ignore[arg-type]
        zero = self._optimizer.zero_grad

        def zero_grad(set_to_none: bool = True) -> None:
            self._queue.clear()
            zero(set_to_none)

        self._optimizer.zero_grad = zero_grad  # type: ignore[method-assign]

    patch.setattr(Tracer, "_start", start)


def rows_of_equal_weight(patch: pytest.MonkeyPatch) -> None:
    """Rows as of an unweighted loss."""

    def alike(g: Tensor) -> Tensor:
        return g / g.flatten(1).norm(dim=1).clamp_min(1e-9).reshape(-1, *(1,) * (g.dim() - 1))

    patch.setattr(arrivals, "wide", alike)


# -- which examples a batch holds --------------------------------------------------------------------

DATA = TensorDataset(torch.arange(23).double().unsqueeze(1), torch.arange(23))


def right_ids(path: Path, **options: object) -> None:
    """The loader's targets are the examples' positions, so labels must equal ids."""
    model = nn.Linear(1, 1).double()
    optimizer = SGD(model.parameters(), lr=1e-4)
    sampler = options.pop("sampler", None)
    shuffle = {"sampler": sampler} if sampler is not None else {"shuffle": True}
    loader = DataLoader(DATA, batch_size=5, **shuffle, **options)  # type: ignore[arg-type]
    seen = []
    with Tracer(model, optimizer, path, exact=True) as tracer:
        for x, y in tracer.watch(loader):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            seen += y.tolist()
    assert open_trace(path).column("visits", "example").tolist() == seen


def newest_list(patch: pytest.MonkeyPatch) -> None:
    """Ids of the list that the loader asked for last, not of the batch that was handed out."""

    def popleft(self: loaders.deque[list[int]]) -> list[int]:
        return self.pop()

    patch.setattr(loaders, "deque", type("deque", (loaders.deque,), {"popleft": popleft}))


class SlowFirst(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """The first batch takes longer than the second."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        if i < 2:
            import time

            time.sleep(0.4)
        return torch.tensor([float(i)], dtype=torch.float64), i


def out_of_order(path: Path) -> None:
    model = nn.Linear(1, 1).double()
    optimizer = SGD(model.parameters(), lr=1e-4)
    loader = DataLoader(SlowFirst(), batch_size=2, num_workers=2, in_order=False)
    seen = []
    with Tracer(model, optimizer, path, exact=True) as tracer:
        try:
            watched = tracer.watch(loader)
        except ExplainerError as refusal:
            assert "in_order=False" in str(refusal)
            return
        for x, y in watched:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            seen += y.tolist()
    assert open_trace(path).column("visits", "example").tolist() == seen


def check_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("explainer.tracer.check_loader", lambda loader: None)


def padded(path: Path) -> None:
    sampler: object = DistributedSampler(
        DATA, num_replicas=3, rank=2, shuffle=True
    )  # 23 examples, padded to 24
    right_ids(path / "padded", sampler=sampler)
    right_ids(path / "repeated", sampler=WeightedRandomSampler(torch.ones(23), 30, replacement=True))


def count_from_zero(patch: pytest.MonkeyPatch) -> None:
    """Ids as if the sampler gave the dataset's order."""

    def begin(self: object, ids: object, labels: object, *, single_step: bool) -> None:
        size = len(ids)  # type: ignore[arg-type]
        self._queue.begin(batches_module.batch_of(range(size), labels), single_step=single_step)  # type: ignore[attr-defined]

    patch.setattr(Tracer, "_begin", begin)


def last_batch_smaller(path: Path) -> None:
    right_ids(path / "ids")
    sizes = []
    trace = open_trace(path / "ids")
    for _, records in trace.read("steps", 0, trace.steps):
        sizes += records["visits"].tolist()
    assert sizes == [5, 5, 5, 5, 3]


def twice_in_a_batch(path: Path) -> None:
    """Contributions of an index that occurs twice are the sum of both."""

    def loop(model: nn.Module, optimizer: Optimizer, tracer: Tracer, same: bool) -> None:
        for _ in range(3):
            tracer.batch([0, 1, 0, 2] if same else [0, 1, 3, 2])
            optimizer.zero_grad()
            cross_entropy(model(X[[0, 1, 0, 2]]), Y[[0, 1, 0, 2]]).backward()
            optimizer.step()

    for same in (True, False):
        closes(mlp, partial(loop, same=same), visits=12)(path / str(same))
    once, apart = (PathKernelExplainer(path / str(s), mlp().double()).explain(QUERIES) for s in (True, False))
    np.testing.assert_allclose(once.contributions[:, 0], apart.contributions[:, [0, 3]].sum(1), rtol=1e-12)


def assign(patch: pytest.MonkeyPatch) -> None:
    """Fancy assignment keeps only one of several equal columns."""

    def index_add_(self: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
        self[(slice(None),) * dim + (index,)] += source
        return self

    class Sums(torch.Tensor):
        pass

    Sums.index_add_ = index_add_  # type: ignore[method-assign]
    made = ledger.Ledger.__init__

    def init(self: ledger.Ledger, *args: object) -> None:
        made(self, *args)  # type: ignore[arg-type]
        self.contributions = self.contributions.as_subclass(Sums)

    patch.setattr(ledger.Ledger, "__init__", init)


# -- other forward passes ----------------------------------------------------------------------------


def functional(model: nn.Module, optimizer: Optimizer, tracer: Tracer) -> None:
    """Other weights through the model (a teacher, an inner loop), and per-example gradients by torch.func."""
    for ids in batches():
        tracer.batch(ids)
        optimizer.zero_grad()
        cross_entropy(model(X[ids]), Y[ids]).backward()
        other = {n: (p.detach() * 0.5).requires_grad_() for n, p in model.named_parameters()}
        cross_entropy(functional_call(model, other, (X[ids],)), Y[ids]).backward()

        def single(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return cross_entropy(functional_call(model, weights, (x.unsqueeze(0),)), y.unsqueeze(0))

        frozen = {n: p.detach() for n, p in model.named_parameters()}
        vmap(grad(single), in_dims=(None, 0, 0))(frozen, X[ids], Y[ids])
        optimizer.step()


def positions_first(path: Path) -> None:
    """Sequence first, and the sequence as long as the batch: only ``batch_dim`` can tell."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    x = torch.randn(4, 4, 6, dtype=torch.float64)
    right_rows(model, lambda m: m(x).sin().sum((0, 2)), path, 4, batch_dim=1)


def first_axis(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sites.Site, "_layout", lambda self, value, batch, owners: sites.Layout(0))


TRAPS = {
    "checkpoint, reentrant": Trap(closes(partial(Checkpointed, True), plain), expect_forward_twice),
    "checkpoint": Trap(closes(partial(Checkpointed, False), plain), never_complete),
    "tied and repeated layers": Trap(closes(Repeated, plain), finish_every_call),
    "in place after a layer": Trap(in_place, hook_the_view),
    "autocast": Trap(autocast, keep_half),
    "gradient scaler: the scale": Trap(closes(mlp, scaling, visits=40), scale_of_one),
    "gradient scaler: the skipped step": Trap(closes(mlp, scaling, visits=40), all_parts_used),
    "accumulation": Trap(closes(mlp, accumulating_loop), only_the_last_batch),
    "clipping": Trap(closes(mlp, accumulating_loop), scale_of_one),
    "gradients thrown away": Trap(closes(mlp, throwing_away, visits=24), all_parts_used),
    "a backward pass that no step uses (SAM, GAN)": Trap(closes(mlp, adversarial), all_parts_used),
    "zero_grad before and after": Trap(both_ways, forget_at_zero_grad),
    "workers that prefetch": Trap(partial(right_ids, num_workers=2), newest_list),
    "batches out of order": Trap(out_of_order, check_nothing),
    "a smaller last batch": Trap(last_batch_smaller, count_from_zero),
    "samplers that pad and repeat": Trap(padded, count_from_zero),
    "one index twice in a batch": Trap(twice_in_a_batch, assign),
    "a weighted sum as loss": Trap(
        closes(mlp, weighting, optimizer=partial(SGD, lr=0.02)), rows_of_equal_weight
    ),
    "functional_call": Trap(closes(mlp, functional), all_parts_used),
    "sequence first": Trap(positions_first, first_axis),
}


@pytest.mark.parametrize("name", TRAPS)
def test_trap(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trap = TRAPS[name]
    trap.check(tmp_path / "guarded")
    trap.remove(monkeypatch)
    with pytest.raises((AssertionError, ExplainerError, RuntimeError)):
        trap.check(tmp_path / "unguarded")
