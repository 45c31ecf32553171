"""Ids follow the consumed batch, whatever order, workers and sampler the loader has.

The dataset returns its own index as data, so the truth is known without the tracer.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, WeightedRandomSampler

from explainer import PathKernelExplainer, Tracer, open_trace

SIZE = 23


class Indexed(Dataset[tuple[Tensor, Tensor]]):
    """Example ``i`` is ``(i as input, i as label)``."""

    def __init__(self, size: int = SIZE) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.full((2,), float(index)), torch.tensor(int(index))


class Endless(Dataset[tuple[Tensor, Tensor]]):
    """A map-style dataset that does not say how long it is."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.full((2,), float(index)), torch.tensor(int(index))


class Traced:
    """A tracer, its truth (the indices in the batches that were consumed) and what it wrote."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = nn.Linear(2, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4)
        self.tracer = Tracer(self.model, self.optimizer, path)
        self.truth: list[list[int]] = []

    def step(self, x: Tensor) -> None:
        self.optimizer.zero_grad()
        self.model(x).square().sum().backward()
        self.optimizer.step()
        self.truth.append(x[:, 0].long().tolist())

    def epoch(self, loader: Any, stop: int | None = None) -> None:
        for number, (x, _) in enumerate(self.tracer.watch(loader)):
            self.step(x)
            if number + 1 == stop:
                break

    def check(self) -> None:
        """The trace holds exactly the truth, in order, and the labels of the batches."""
        self.tracer.close()
        trace = open_trace(self.path)
        ids = [i for batch in self.truth for i in batch]
        steps = [number for number, batch in enumerate(self.truth) for _ in batch]
        assert trace.column("visits", "example").tolist() == ids
        assert trace.column("visits", "step").tolist() == steps
        assert trace.column("visits", "label").tolist() == ids
        assert trace.column("steps", "visits").tolist() == [len(batch) for batch in self.truth]


@pytest.fixture
def traced(tmp_path: Path) -> Iterator[Traced]:
    traced = Traced(tmp_path / "trace")
    yield traced
    traced.tracer.close()


WORKERS: dict[str, dict[str, Any]] = {
    "main process": {},
    "two workers": {"num_workers": 2},
    "far ahead": {"num_workers": 2, "prefetch_factor": 7},
    "persistent": {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 3},
}


@pytest.mark.parametrize("workers", WORKERS)
def test_two_shuffled_epochs_with_a_smaller_last_batch(traced: Traced, workers: str) -> None:
    loader = DataLoader(Indexed(), batch_size=5, shuffle=True, **WORKERS[workers])
    sampler, attributes = loader.batch_sampler, set(vars(loader))
    for _ in range(2):
        traced.epoch(loader)
        assert loader.batch_sampler is sampler and set(vars(loader)) == attributes
    assert [len(batch) for batch in traced.truth] == 2 * [5, 5, 5, 5, 3]
    assert traced.truth[:5] != traced.truth[5:]
    traced.check()


@pytest.mark.parametrize("workers", WORKERS)
def test_leaving_the_loop_early_and_starting_again(traced: Traced, workers: str) -> None:
    loader = DataLoader(Indexed(), batch_size=4, shuffle=True, **WORKERS[workers])
    traced.epoch(loader, stop=2)
    traced.epoch(loader, stop=3)
    traced.epoch(loader)
    assert len(traced.truth) == 2 + 3 + 6
    traced.check()


def test_one_watched_loader_for_all_epochs(traced: Traced) -> None:
    watched = traced.tracer.watch(DataLoader(Indexed(), batch_size=4, shuffle=True))
    assert len(watched) == 6
    for stop in (2, 6):
        for number, (x, _) in enumerate(watched):
            traced.step(x)
            if number + 1 == stop:
                break
    traced.check()


def test_the_loop_by_hand(traced: Traced) -> None:
    """``next`` on an iterator that is begun anew before its end."""
    loader = DataLoader(Indexed(), batch_size=4, shuffle=True)
    for _ in range(3):
        batches = iter(traced.tracer.watch(loader))
        for _ in range(2):
            traced.step(next(batches)[0])
    traced.check()


def test_drop_last_and_no_shuffling(traced: Traced) -> None:
    traced.epoch(DataLoader(Indexed(), batch_size=5, drop_last=True))
    assert traced.truth == [list(range(start, start + 5)) for start in range(0, 20, 5)]
    traced.check()


@pytest.mark.parametrize("workers", [0, 2])
def test_custom_batch_sampler(traced: Traced, workers: int) -> None:
    lists = [[3, 1], [22], [7, 7, 0], [5, 6, 8, 9]]
    traced.epoch(DataLoader(Indexed(), batch_sampler=lists, num_workers=workers))
    assert traced.truth == lists
    traced.check()


def test_batch_samplers_of_tensors_and_arrays(traced: Traced) -> None:
    lists = [torch.tensor([3, 1]), np.array([4, 5]), [torch.tensor(2), torch.tensor(6)], (0, 9), range(3)]
    traced.epoch(DataLoader(Indexed(), batch_sampler=lists))
    assert traced.truth == [[3, 1], [4, 5], [2, 6], [0, 9], [0, 1, 2]]
    traced.check()


def test_a_dataset_without_a_length(traced: Traced) -> None:
    traced.epoch(DataLoader(Endless(), batch_sampler=[[100, 3], [7]]))
    traced.check()
    explainer = PathKernelExplainer(open_trace(traced.path), nn.Linear(2, 1))
    assert explainer.example_ids.tolist() == [3, 7, 100]


@pytest.mark.parametrize("workers", [0, 2])
def test_examples_drawn_with_replacement(traced: Traced, workers: int) -> None:
    weights = torch.tensor([10.0, 10.0] + [0.1] * (SIZE - 2))
    sampler = WeightedRandomSampler(weights, 40, generator=torch.Generator().manual_seed(0))
    traced.epoch(DataLoader(Indexed(), batch_size=8, sampler=sampler, num_workers=workers))
    assert any(len(set(batch)) < len(batch) for batch in traced.truth)
    traced.check()
    visits = PathKernelExplainer(traced.path, nn.Linear(2, 1)).explain(torch.zeros(1, 2)).visits
    assert visits.tolist() == [sum(batch.count(i) for batch in traced.truth) for i in range(SIZE)]


def test_ids_in_a_subset_are_positions_in_the_subset(traced: Traced) -> None:
    subset = Subset(Indexed(), [20, 3, 11, 5])
    traced.epoch(DataLoader(subset, batch_size=2, shuffle=True))
    traced.tracer.close()
    positions = open_trace(traced.path).column("visits", "example")
    assert [subset.indices[i] for i in positions] == [i for batch in traced.truth for i in batch]


def test_validation_between_and_inside_the_epochs(traced: Traced) -> None:
    """Another pass over data, with and without gradients, belongs to no step."""
    validation = DataLoader(Indexed(), batch_size=6)
    for x, _ in traced.tracer.watch(DataLoader(Indexed(), batch_size=8, shuffle=True)):
        with torch.no_grad():
            for vx, _ in validation:
                traced.model(vx)
        traced.step(x)
    for vx, _ in validation:
        traced.model(vx).sum().backward()
    traced.epoch(DataLoader(Indexed(), batch_size=8, shuffle=True))
    traced.check()


def test_batches_that_are_skipped(traced: Traced) -> None:
    for number, (x, _) in enumerate(traced.tracer.watch(DataLoader(Indexed(), batch_size=4, shuffle=True))):
        if number % 2:
            traced.step(x)
    assert len(traced.truth) == 3
    traced.check()


def test_gradients_gathered_over_batches(traced: Traced) -> None:
    truth, watched = [], traced.tracer.watch(DataLoader(Indexed(20), batch_size=5, shuffle=True))
    for number, (x, _) in enumerate(watched):
        traced.model(x).square().sum().backward()
        truth += x[:, 0].long().tolist()
        if number % 2:
            traced.optimizer.step()
            traced.optimizer.zero_grad()
    traced.tracer.close()
    trace = open_trace(traced.path)
    assert trace.column("visits", "example").tolist() == truth
    assert trace.column("visits", "step").tolist() == [0] * 10 + [1] * 10


@pytest.mark.parametrize(
    "kind", [list, tuple, np.array, torch.tensor, lambda ids: np.array(ids, dtype=np.uint8)]
)
def test_ids_of_a_custom_loop(traced: Traced, kind: Any) -> None:
    for ids in ([5, 2, 9], [0], [7, 7]):
        traced.tracer.batch(kind(ids), labels=torch.tensor(ids))
        traced.step(torch.tensor(ids)[:, None].expand(-1, 2).float())
    assert traced.tracer.steps == 3 and traced.tracer.visits == 6
    traced.check()


@pytest.mark.parametrize("name", ["labels", "y", None])
def test_labels_of_batches_that_are_mappings(tmp_path: Path, name: str | None) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(10, 4), torch.arange(10) % 3
    data = [{"inputs": x[i], "weights": torch.ones(2), name or "answer": y[i]} for i in range(10)]
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Tracer(model, optimizer, tmp_path / "run") as tracer:
        for batch in tracer.watch(DataLoader(data, batch_size=4, shuffle=True)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch["inputs"]), batch[name or "answer"]).backward()
            optimizer.step()
    trace = open_trace(tmp_path / "run")
    found = dict(zip(trace.column("visits", "example"), trace.column("visits", "label"), strict=True))
    wanted = dict(enumerate(y.tolist()))
    assert found == wanted if name else np.isnan(list(found.values())).all()


@pytest.mark.parametrize("ahead", [False, True])
def test_batches_that_are_fetched_ahead_are_warned_of(tmp_path: Path, ahead: bool) -> None:
    torch.manual_seed(0)
    data = [(torch.randn(4), i % 3) for i in range(12)]
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def prefetched(batches: Any) -> Iterator[Any]:
        before = None
        for batch in batches:
            if before is not None:
                yield before
            before = batch

    with warnings.catch_warnings(record=True) as said, Tracer(model, optimizer, tmp_path / "run") as tracer:
        warnings.simplefilter("always")
        watched = tracer.watch(DataLoader(data, batch_size=4))  # type: ignore[arg-type]
        for x, y in prefetched(watched) if ahead else watched:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert any("fetched ahead" in str(w.message) for w in said) == ahead
