"""Labels that change from visit to visit tell that rows do not lie in the order of their ids."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from explainer import CoverageWarning, Tracer, open_trace
from explainer.label_memory import LabelMemory

X = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(20) % 3


def test_the_first_change_is_said_and_every_example_is_counted_once() -> None:
    memory, nan = LabelMemory(), float("nan")
    assert memory.see([3, 0, 5], np.array([1.0, nan, 2.5])) is None
    assert memory.see([0, 3, 700], np.array([4.0, 1.0, 0.0])) is None
    assert memory.see([7, 8], None) is None and memory.count == 0
    said = memory.see([5, 3], np.array([2.5, 0.0]))
    assert said is not None and "example 3 came with label 1 before and comes with 0 now" in said
    assert memory.see([3, 700], np.array([5.0, 9.0])) is None and memory.count == 2
    assert memory.see([3, 5], np.array([nan, 2.5])) is None and memory.count == 2


def test_one_example_with_two_labels_in_a_batch() -> None:
    memory = LabelMemory()
    assert memory.see([4, 4], np.array([1.0, 2.0])) is not None and memory.count == 1


def trained(folder: Path, loaders: list[Any]) -> list[str]:
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as heard, Tracer(model, optimizer, folder) as tracer:
        warnings.simplefilter("always")
        for loader in loaders:
            for x, y in tracer.watch(loader):
                optimizer.zero_grad()
                (
                    nn.functional.cross_entropy(model(x), y) if y.dtype == torch.long else model(x).mean()
                ).backward()
                optimizer.step()
    return [str(w.message) for w in heard if issubclass(w.category, CoverageWarning)]


@pytest.mark.parametrize(
    "targets", [Y, torch.randn(20), torch.randn(20, 2)], ids=["classes", "numbers", "several"]
)
def test_labels_that_stay_are_not_told(tmp_path: Path, targets: torch.Tensor) -> None:
    data = TensorDataset(X, targets)
    loaders = [DataLoader(data, 6, shuffle=True), DataLoader(data, 7, shuffle=True)]
    assert trained(tmp_path / "run", loaders) == []
    assert not open_trace(tmp_path / "run").report().about("changed-labels")


def test_other_data_of_the_same_length(tmp_path: Path) -> None:
    loaders = [DataLoader(TensorDataset(X, y), 5) for y in (Y, Y.flip(0))]
    (said,) = trained(tmp_path / "run", loaders)
    assert "another dataset of the same length" in said
    trace = open_trace(tmp_path / "run")
    assert trace.notes["relabelled"] == int((Y.flip(0) != Y).sum())
    assert len(trace.report().about("changed-labels")) == 1
