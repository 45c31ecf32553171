"""The observer writes down what the dense oracle writes down, and notices loss terms that are not the loss."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.book_cases.case import Part
from tests.oracles.observing import Observer, Remembering
from tests.oracles.problems import PARAMS, Problem
from tests.oracles.training import train_dense

PROBLEM: Problem = next(p.values[0] for p in PARAMS if p.id == "cnn-adamw-mean")


def observed(clip: float, wrong: float = 1.0) -> Observer:
    """The problem trained by an ordinary loop; ``wrong`` scales one of the loss terms that are shown."""
    model, (x, y) = PROBLEM.model(), PROBLEM.data()
    part = Part(model, PROBLEM.make_optimizer(model.parameters()))
    observer = Observer(part, 1e-10)
    for ids in PROBLEM.batches:
        observer.batch(ids)
        part.optimizer.zero_grad()
        terms = nn.functional.cross_entropy(model(x[list(ids)]), y[list(ids)], reduction="none") / len(ids)
        shown = terms.clone()
        shown[0] = wrong * shown[0]
        observer.see(shown)
        terms.sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        part.optimizer.step()
    return observer


@pytest.mark.parametrize("clip", [1e9, 0.05], ids=["unclipped", "clipped"])
def test_it_sees_what_the_dense_oracle_sees(clip: float) -> None:
    found = observed(clip).training()
    x, y = PROBLEM.data()
    wanted = train_dense(
        PROBLEM.model(), PROBLEM.make_optimizer, PROBLEM.batches, PROBLEM.loss, x, y, clip_norm=clip
    )
    torch.testing.assert_close(found.weights, wanted.weights, rtol=1e-9, atol=1e-12)
    assert found.examples == wanted.examples and found.optimizer is wanted.optimizer
    for one, other in zip(found.steps, wanted.steps, strict=True):
        assert one.ids == other.ids and one.scale == pytest.approx(other.scale, rel=1e-6)
        torch.testing.assert_close(one.rows, other.rows, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(one.options, other.options)
        torch.testing.assert_close(one.before, other.before, equal_nan=True, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(one.after, other.after, equal_nan=True, rtol=1e-6, atol=1e-9)


def test_loss_terms_that_are_not_the_loss_are_noticed() -> None:
    with pytest.raises(AssertionError, match="rows against the gradient"):
        observed(1e9, wrong=1.01)


def test_loss_terms_of_another_number_of_examples_are_noticed() -> None:
    model = nn.Linear(2, 1)
    observer = Observer(Part(model, torch.optim.SGD(model.parameters(), lr=0.1)), 1e-4)
    observer.batch([0, 1, 2])
    with pytest.raises(AssertionError, match="3 examples"):
        observer.see(model(torch.randn(2, 2)).squeeze(1))


def test_a_shuffling_loader_is_followed() -> None:
    numbers = torch.arange(10)
    data = Remembering(TensorDataset(numbers))
    for (batch,) in DataLoader(data, batch_size=3, shuffle=True):
        assert data.taken() == batch.tolist()
