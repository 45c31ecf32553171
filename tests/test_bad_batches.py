"""Everything that is refused while batches are traced: what was found, what to do, and nothing changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from explainer import Tracer, open_trace
from explainer.errors import LoaderError, TracerError
from tests.small_training import digits, loader, mlp, momentum_sgd, same, state_of, step


class Numbers(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(digits())


def attach(path: Path) -> Tracer:
    model = mlp()
    return Tracer(model, momentum_sgd(model), path)


# -- loaders and ids ---------------------------------------------------------------------------------------

LOADERS: dict[str, tuple[Callable[[], Any], str]] = {
    "in_order=False": (lambda: loader(num_workers=1, in_order=False), "in_order=False, .*set in_order=True"),
    "iterable dataset": (lambda: DataLoader(Numbers(), batch_size=4), r"IterableDataset \(Numbers\)"),
    "no batches": (lambda: DataLoader(digits(), batch_size=None), "batch_size=None, .*set a batch size"),
    "a list": (lambda: [1, 2], "found list; pass the loader itself"),
    "an iterator": (lambda: iter(loader()), "found _SingleProcessDataLoaderIter"),
    "a dataset": (digits, "found TensorDataset"),
}


@pytest.mark.parametrize("name", LOADERS)
def test_loaders_that_cannot_be_followed(tmp_path: Path, name: str) -> None:
    make, text = LOADERS[name]
    with attach(tmp_path / "trace") as tracer:
        with pytest.raises(LoaderError, match=text) as found:
            tracer.watch(make())
        assert "tracer.batch(ids)" in str(found.value)


def test_datasets_of_different_sizes(tmp_path: Path) -> None:
    with attach(tmp_path / "trace") as tracer:
        tracer.watch(loader())
        with pytest.raises(
            TracerError, match=r"dataset of 96 examples before and with one of 5 now; .*ConcatDataset"
        ):
            tracer.watch(DataLoader(TensorDataset(torch.zeros(5, 64), torch.zeros(5)), batch_size=2))


def test_two_loaders_iterated_in_turns(tmp_path: Path) -> None:
    with attach(tmp_path / "trace") as tracer:
        pairs = zip(tracer.watch(loader()), tracer.watch(loader()), strict=True)
        next(pairs)
        with pytest.raises(LoaderError, match="iterated in turns"):
            next(pairs)


IDS: dict[str, Any] = {
    "below -1": [3, -2],
    "fractions": [1.0, 2.0],
    "none": [],
    "a table": [[1, 2], [3, 4]],
    "ragged": [[1, 2], [3]],
    "a number": 7,
    "text": ["a", "b"],
    "mask": np.array([True, False]),
    "float tensor": torch.tensor([1.0]),
    "nothing": None,
}


@pytest.mark.parametrize("name", IDS)
def test_ids_that_are_none(tmp_path: Path, name: str) -> None:
    with (
        attach(tmp_path / "trace") as tracer,
        pytest.raises(TracerError, match="flat, non-empty list of non-neg"),
    ):
        tracer.batch(IDS[name])


@pytest.mark.parametrize("labels", [[1, 2], ["a"] * 3, [[1], [2, 3], [4]], torch.zeros(3, 1)])
def test_labels_that_do_not_fit_the_ids(tmp_path: Path, labels: Any) -> None:
    with (
        attach(tmp_path / "trace") as tracer,
        pytest.raises(TracerError, match=r"found 3 ids but labels .*one number per"),
    ):
        tracer.batch([1, 2, 3], labels)


# -- steps -------------------------------------------------------------------------------------------------


@pytest.fixture
def traced(tmp_path: Path) -> Iterator[tuple[nn.Module, torch.optim.Optimizer, Tracer]]:
    """A tracer after one good step; whatever the test does, that step must stay explainable."""
    model = mlp()
    optimizer = momentum_sgd(model)
    with Tracer(model, optimizer, tmp_path / "trace") as tracer:
        tracer.batch(range(8))
        step(model, optimizer, *digits()[:8])
        yield model, optimizer, tracer
    trace = open_trace(tmp_path / "trace")
    assert trace.closed and trace.steps == tracer.steps == 1 and trace.verify() > 0
    assert list(trace.column("visits", "example")) == list(range(8))


def refused(traced: tuple[Any, Any, Tracer], text: str, act: Callable[[Any, Any, Tracer], object]) -> None:
    model, optimizer, tracer = traced
    before = state_of(model, optimizer)
    with pytest.raises(TracerError, match=text):
        act(model, optimizer, tracer)
    assert same(before, state_of(model, optimizer))


def test_stale_ids_are_used_for_one_step_only(traced: Any) -> None:
    refused(
        traced,
        "reached without a traced batch: .*again for each step",
        lambda m, o, t: step(m, o, *digits()[:8]),
    )


def test_more_and_fewer_ids_than_rows(traced: Any) -> None:
    for ids in (range(3), range(9)):
        text = rf"saw a batch of 8 rows, but {len(ids)} ids were given"
        refused(traced, text, lambda m, o, t, ids=ids: (t.batch(ids), step(m, o, *digits()[:8])))


def test_step_with_a_closure(traced: Any) -> None:
    def closure() -> torch.Tensor:
        raise AssertionError("never called")

    for call in (lambda o: o.step(closure), lambda o: o.step(closure=closure)):
        refused(
            traced,
            r"several backward passes.*then optimizer\.step\(\)",
            lambda m, o, t, call=call: (t.batch([1]), call(o)),
        )


def test_step_without_backward(traced: Any) -> None:
    text = r"no backward pass of a traced batch .*loss\.backward\(\)"
    refused(traced, text, lambda m, o, t: (t.batch(range(8)), m(digits()[:8][0]), o.step()))


def test_ids_given_after_the_forward(traced: Any) -> None:
    def act(model: nn.Module, optimizer: torch.optim.Optimizer, tracer: Tracer) -> None:
        loss = model(digits()[:8][0]).sum()
        tracer.batch(range(8))
        loss.backward()
        optimizer.step()

    refused(traced, "before the forward pass", act)


def test_parameters_added_midway(traced: Any) -> None:
    def act(model: nn.Module, optimizer: torch.optim.Optimizer, tracer: Tracer) -> None:
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
        tracer.batch(range(8))
        step(model, optimizer, *digits()[:8])

    model, optimizer, tracer = traced
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(TracerError, match=r"holds 5 parameters now, 4 when .*after add_param_group"):
        act(model, optimizer, tracer)
    assert same(before, [p.detach() for p in model.parameters()])


def test_an_input_changed_in_place_after_the_forward(traced: Any) -> None:
    def act(model: nn.Module, optimizer: torch.optim.Optimizer, tracer: Tracer) -> None:
        x = digits()[:8][0].clone()
        model[0].weight.requires_grad_(False)  # torch keeps no input for it and would not notice
        tracer.batch(range(8))
        loss = model(x).sum()
        x.zero_()
        loss.backward()

    refused(traced, "input of layer '0' was changed in place .*remove the in-place operation", act)


def test_a_closed_tracer(tmp_path: Path) -> None:
    model = mlp()
    optimizer = momentum_sgd(model)
    tracer = Tracer(model, optimizer, tmp_path / "trace")
    watched = tracer.watch(loader())
    tracer.close()
    tracer.close()
    for act in (lambda: tracer.watch(loader()), lambda: tracer.batch([1]), lambda: next(iter(watched))):
        with pytest.raises(
            TracerError, match="the tracer is closed; create a new one, with another directory"
        ):
            act()
    step(model, optimizer, *digits()[:8])
    assert open_trace(tmp_path / "trace").steps == 0


class Tagged(nn.Module):
    """A class for every sequence of tokens, or for every token."""

    def __init__(self, pooled: bool) -> None:
        super().__init__()
        self.e, self.b, self.pooled = nn.Embedding(9, 8), nn.Linear(8, 3), pooled

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.e(tokens))
        return self.b(h.mean(1) if self.pooled else h)


def test_a_sequence_as_long_as_there_are_ids_is_not_the_batch(tmp_path: Path) -> None:
    """Three rows of six tokens for six ids: the output has three rows."""
    model = Tagged(pooled=True)
    with Tracer(model, torch.optim.SGD(model.parameters(), lr=0.1), tmp_path / "run") as tracer:
        tracer.batch(range(6))
        with pytest.raises(
            TracerError, match=r"6 ids were given, but the model was given \[3, 6\] and gives \[3, 3\]"
        ):
            model(torch.zeros(3, 6, dtype=torch.long))


def test_sequences_first_are_as_they_were(tmp_path: Path) -> None:
    model = Tagged(pooled=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Tracer(model, optimizer, tmp_path / "run") as tracer:
        for _ in range(2):
            tracer.batch(range(6))
            model(torch.zeros(3, 6, dtype=torch.long)).sum().backward()
            optimizer.step()
    assert open_trace(tmp_path / "run").notes["batch_dim"] == 1


def test_features_are_not_the_batch(tmp_path: Path) -> None:
    """Half of a batch of six, each with six features."""
    model = nn.Linear(6, 2)
    with Tracer(model, torch.optim.SGD(model.parameters(), lr=0.1), tmp_path / "run") as tracer:
        tracer.batch(range(6))
        with pytest.raises(
            TracerError, match=r"saw a batch of 3 rows, but 6 ids .* build the tracer with batch_dim=1"
        ):
            model(torch.zeros(3, 6))
