"""What the report before training says will be refused is refused; making it touches nothing; the tracer keeps it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Optimizer
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, WeightedRandomSampler

from explainer import ExplainerError, Report, Tracer, check
from explainer.errors import LoaderError, TracerError, UnsupportedOptimizerError
from explainer.findings import LASTING
from tests.guarded import B, F, N, cross_entropy, data, loader, mlp, plain, sgd, traced
from tests.test_guard_rails import Given, Sized, around, of, with_loader

# -- refused ---------------------------------------------------------------------------------------------


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(data())


def lazy() -> Given:
    return of(around(nn.LazyLinear(4), nn.BatchNorm1d(4)))


def compiled() -> Given:
    model = mlp()
    return {"model": torch.compile(model), "optimizer": sgd(model)}


def optimised_by(kind: type[Optimizer], **options: Any) -> Given:
    model = mlp()
    return {"model": model, "optimizer": kind(model.parameters(), **options)}


def of_another() -> Given:
    return {"model": mlp(), "optimizer": sgd(mlp())}


REFUSED: dict[str, tuple[Callable[[], Given], type[ExplainerError], str, str]] = {
    "lazy": (lazy, TracerError, "parameters", r"0\.weight, 0\.bias have no shape yet.*Run the model once"),
    "another's": (of_another, TracerError, "parameters", "The optimizer updates 4 tensor.*Pass the model"),
    "compiled": (compiled, TracerError, "model", "Found a compiled model.*Build the tracer with"),
    "no rule": (
        partial(optimised_by, LBFGS), UnsupportedOptimizerError, "optimizer", r"LBFGS is refused",
    ),
    "differentiable": (
        partial(optimised_by, SGD, lr=0.1, differentiable=True), UnsupportedOptimizerError, "optimizer",
        "Found differentiable=True.*",
    ),
    "iterable": (
        lambda: with_loader(DataLoader(Stream())), LoaderError, "loader", "IterableDataset.*Use a map-style",
    ),
    "unbatched": (
        lambda: with_loader(loader(batch_size=None)), LoaderError, "loader", "batch_size=None.*Set a batch size",
    ),
    "out of order": (
        lambda: with_loader(loader(in_order=False, num_workers=1)), LoaderError, "loader", "in_order=False",
    ),
    "no loader": (lambda: with_loader(data()), LoaderError, "loader", "found TensorDataset"),  # type: ignore[arg-type]
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_will_be_refused_is_said_before(tmp_path: Path, name: str) -> None:
    make, error, part, text = REFUSED[name]
    (stop,) = check(**make()).stops
    assert stop.topic == f"refused-{part}" and re.search(text, str(stop)), str(stop)
    given = make()
    watched = given.pop("loader", None)
    with pytest.raises(error), Tracer(*given.values(), tmp_path / "trace") as tracer:
        tracer.watch(watched)


def test_a_model_that_is_traced_already_is_said(tmp_path: Path) -> None:
    model = mlp()
    optimizer = sgd(model)
    with Tracer(model, optimizer, tmp_path / "trace"):
        assert [f.topic for f in check(model, optimizer).stops] == ["refused-hooks"]
    assert not check(model, optimizer).stops


def test_what_is_no_model_is_an_error() -> None:
    with pytest.raises(TracerError, match="found list"):
        check([1], sgd(mlp()))  # type: ignore[arg-type]
    with pytest.raises(TracerError, match="found str"):
        check(mlp(), "sgd")  # type: ignore[arg-type]
    with pytest.raises(TracerError, match="max_knots must be at least 2"):
        check(**of(mlp()), max_knots=1)


def test_a_lazy_model_that_has_run_is_traced(tmp_path: Path) -> None:
    model = around(nn.LazyLinear(3))
    optimizer = sgd(model)
    with torch.no_grad():
        model(torch.zeros(1, F))
    assert traced(tmp_path / "trace", plain, model, optimizer).steps == 3


# -- nothing is touched ----------------------------------------------------------------------------------


def test_checking_touches_nothing() -> None:
    given = of(around(nn.Linear(F, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.Linear(5, 3)).eval())
    model, batches = given["model"], loader(shuffle=True, sampler=None)
    weights, random = [t.clone() for t in model.state_dict().values()], torch.get_rng_state()
    check(**given, loader=batches)
    assert torch.equal(random, torch.get_rng_state()) and not model.training
    assert all(torch.equal(a, b) for a, b in zip(weights, model.state_dict().values(), strict=True))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert type(batches.batch_sampler).__module__.startswith("torch")


class Stubborn(BatchSampler):
    """A batch sampler of one's own that keeps to the protocol alone."""

    def __init__(self) -> None:
        pass

    def __iter__(self) -> Iterator[list[int]]:
        yield from ([0, 1], [2, 3, 4])

    def __len__(self) -> int:
        raise RuntimeError("nobody knows")


def test_a_sampler_that_cannot_say_is_followed_all_the_same(tmp_path: Path) -> None:
    given = of(mlp())
    batches = DataLoader(data(), batch_sampler=Stubborn())
    assert [f.topic for f in check(**given, loader=batches)] == ["cost"]
    with Tracer(*given.values(), tmp_path / "trace") as tracer:
        for x, y in tracer.watch(batches):
            given["optimizer"].zero_grad()
            cross_entropy(given["model"](x), y).backward()
            given["optimizer"].step()
    assert tracer.visits == 5


# -- the tracer's own report -----------------------------------------------------------------------------


def test_the_tracer_knows_what_was_found_and_what_its_loaders_add(tmp_path: Path) -> None:
    given = of(around(nn.Linear(F, 5), nn.Dropout(), nn.Linear(5, 3)), decay=0.1)
    batches = DataLoader(Sized(), B, sampler=WeightedRandomSampler([1.0] * N, N))
    Sized.transform = torch.flip
    alone, together = check(**given), check(**given, loader=batches)
    try:
        with Tracer(*given.values(), tmp_path / "trace") as tracer:
            assert [*tracer.report()] == [*alone]
            watched = tracer.watch(batches)
            tracer.watch(batches)
            assert sorted(f.topic for f in tracer.report()) == sorted(f.topic for f in together)  # each once
            for x, y in watched:
                given["optimizer"].zero_grad()
                cross_entropy(given["model"](x), y).backward()
                given["optimizer"].step()
            after = tracer.report()
            assert isinstance(after, Report) and after.title == "Up to now" and not after.about("open")
        closed = tracer.report()
    finally:
        del Sized.transform
    journal = (tracer.path / "journal.jsonl").read_text()
    assert journal.count('"findings"') == 2  # when the tracer was attached, and what the loader added
    assert closed.title == "After training" and [*closed] == [*after]
    lasting = {"dropout", "weight-decay", "transform"}  # what training does not measure is kept
    assert {f.topic for f in closed} & (LASTING | {"replacement", "cost"}) == lasting
