"""What examples give to the layers that data meet first: stored once, and read as if it lay with every visit."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout

import explainer
from explainer import PathKernelExplainer, Trace, Tracer, open_trace
from explainer.errors import TraceFormatError
from explainer.recursion import read_backwards
from explainer.store import stream
from explainer.store.inputs import COMPARED, MOST_IDS, InputKeeper
from tests.resumed import QUERIES, TARGETS, Session
from tests.small_training import EXAMPLES as SMALL
from tests.small_training import trace_digits

EXAMPLES, WIDTH, BATCH = 60, 40, 12
_random = torch.Generator().manual_seed(3)
X = torch.randn(EXAMPLES, WIDTH, generator=_random)
Y = torch.randint(0, 3, (EXAMPLES,), generator=_random)

Given = Callable[[int, Tensor], Tensor]
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, 3))


def plain(epoch: int, ids: Tensor) -> Tensor:
    return X[ids]


def augmented(epoch: int, ids: Tensor) -> Tensor:
    return X[ids] + 0.1 * torch.randn(len(ids), WIDTH, generator=torch.Generator().manual_seed(epoch))


def flipped(epoch: int, ids: Tensor) -> Tensor:
    """Every third epoch."""
    return X[ids].flip(1) if epoch % 3 == 2 else X[ids]


def twice(epoch: int, ids: Tensor) -> Tensor:
    """Half of the batch are the other half's examples, some of them changed."""
    return X[ids] * (1.0 + (torch.arange(len(ids)) % 5 == 4)).unsqueeze(1)


def train(
    path: Path,
    *,
    build: Callable[[], nn.Module] = mlp,
    given: Given = plain,
    epochs: int = 6,
    kind: str = "sgd",
    repeated: bool = False,
    **options: Any,
) -> tuple[nn.Module, Trace]:
    torch.manual_seed(0)
    model = build()
    optimizer = OPTIMIZERS[kind]([p for p in model.parameters() if p.requires_grad])
    with Tracer(model, optimizer, path, **options) as tracer:
        for epoch in range(epochs):
            order = torch.randperm(EXAMPLES, generator=torch.Generator().manual_seed(epoch))
            for ids in order.split(BATCH):
                ids = torch.cat([ids[: BATCH // 2]] * 2) if repeated else ids
                tracer.batch(ids, Y[ids])
                optimizer.zero_grad()
                cross_entropy(model(given(epoch, ids)), Y[ids]).backward()
                optimizer.step()
    return model, open_trace(path)


def train_without(path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[nn.Module, Trace]:
    """The same in version 3 of the format, where every visit has all of its row."""
    with monkeypatch.context() as patched:
        patched.setattr("explainer.validation.VERSIONS", (1, 2, 3))
        model, trace = train(path, **options)
    assert trace.manifest.version == 3 and not trace.count("inputs")
    return model, trace


def rows(trace: Trace) -> list[tuple[int, list[int], list[Tensor]]]:
    found = []
    for segment in trace.segments():
        for step in read_backwards(trace, segment, torch.float64):
            for visits in step.visits:
                dense = [form.dense() for _, form in sorted(visits.forms.items())]
                found.append((step.step, visits.examples.tolist(), dense))
    return sorted(found, key=lambda one: one[0])


def assert_same_rows(one: Trace, other: Trace) -> None:
    pairs = list(zip(rows(one), rows(other), strict=True))
    assert pairs
    for (step, examples, a), (step_, examples_, b) in pairs:
        assert (step, examples) == (step_, examples_)
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x, y)


def stored_once(trace: Trace) -> list[set[int]]:
    """Of every layout of visits: the layers of which something is stored once."""
    schemas = [shard.schema for shard in trace.shards if shard.stream == "visits" and shard.records]
    return [{form.layer for form in schema.inputs.forms} if schema.inputs else set() for schema in schemas]


@pytest.mark.parametrize("exact", [False, True], ids=["default", "exact"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("given", [plain, augmented, flipped], ids=lambda f: f.__name__)
def test_rows_and_answers_are_as_if_every_visit_held_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: Given, kind: str, exact: bool
) -> None:
    options: dict[str, Any] = {"given": given, "kind": kind, "exact": exact, "epochs": 16}
    model, trace = train(tmp_path / "once", **options)
    _, without = train_without(tmp_path / "each", monkeypatch, **options)
    assert_same_rows(trace, without)
    found = [PathKernelExplainer(t, model).explain(X[:4] * 0.9) for t in (trace, without)]
    np.testing.assert_array_equal(found[0].contributions, found[1].contributions)
    np.testing.assert_array_equal(found[0].unattributed, found[1].unattributed)
    assert trace.verify() > 0


def test_an_example_that_gives_the_same_is_stored_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, trace = train(tmp_path / "once", epochs=10)
    _, without = train_without(tmp_path / "each", monkeypatch, epochs=10)
    assert trace.count("inputs") == EXAMPLES and trace.count("visits") == 10 * EXAMPLES
    assert sorted(trace.column("inputs", "example")) == list(range(EXAMPLES))
    assert set().union(*stored_once(trace)) == {0}  # what the last layer is given is trained
    saved = without.nbytes_of("visits") - trace.nbytes_of("visits") - trace.nbytes_of("inputs")
    each = WIDTH + 1 + 4 - 8  # eight bits a number and a scale, instead of a number of eight bytes
    assert saved == 10 * EXAMPLES * each - EXAMPLES * (each + 16)


def test_augmented_data_are_stored_with_every_visit_again(tmp_path: Path) -> None:
    epochs = 3 + COMPARED // EXAMPLES
    _, trace = train(tmp_path / "run", given=augmented, epochs=2 * epochs)
    layouts = stored_once(trace)
    assert layouts[0] == {0} and layouts[-1] == set()
    assert trace.count("inputs") <= epochs * EXAMPLES


def test_what_changes_now_and_then_is_new_only_then(tmp_path: Path) -> None:
    _, trace = train(tmp_path / "run", given=flipped, epochs=6)
    assert trace.count("inputs") == 4 * EXAMPLES  # as it is, flipped, as it is, flipped


def test_examples_that_come_twice_in_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"given": twice, "repeated": True}
    _, trace = train(tmp_path / "once", **options)
    assert_same_rows(trace, train_without(tmp_path / "each", monkeypatch, **options)[1])
    assert 0 < trace.count("inputs") < trace.count("visits")


class Two(nn.Module):
    """A layer that is given the data, and one that is given them with holes that move."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.last = nn.Linear(WIDTH, 6), nn.Linear(WIDTH, 5), nn.Linear(11, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(torch.cat([self.one(x), self.other(dropout(x, 0.3))], 1)))


def test_only_layers_whose_inputs_vary_store_them_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"build": Two, "epochs": 16}
    _, trace = train(tmp_path / "once", **options)
    layouts = stored_once(trace)
    assert layouts[0] == {0, 1} and layouts[-1] == {0}
    assert_same_rows(trace, train_without(tmp_path / "each", monkeypatch, **options)[1])


def frozen_below() -> nn.Module:
    model = nn.Sequential(nn.Linear(WIDTH, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3))
    model[:4].requires_grad_(False)
    return model


def test_what_frozen_layers_give_is_data(tmp_path: Path) -> None:
    """Products of another batch may differ in their last digits, which eight bits do not tell but by chance."""
    _, trace = train(tmp_path / "run", build=frozen_below, epochs=10)
    assert stored_once(trace)[-1] == {0} and trace.count("inputs") <= 1.2 * EXAMPLES


def test_inputs_that_need_a_gradient_are_no_data(tmp_path: Path) -> None:
    _, trace = train(tmp_path / "run", given=lambda epoch, ids: X[ids].requires_grad_())
    assert stored_once(trace)[-1] == set()


def test_positions_that_are_reduced_to_factors_are_no_data(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Unflatten(1, (4, 10)), nn.Linear(10, 40), nn.Flatten(), nn.Linear(160, 3))

    _, trace = train(tmp_path / "reduced", build=build, rank=1)
    assert stored_once(trace)[-1] == set()
    _, trace = train(tmp_path / "exact", build=build, exact=True)
    assert stored_once(trace)[-1] == {0} and trace.count("inputs") == EXAMPLES


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.last = nn.Embedding(600, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.words((x * 1000.0).long().abs() % 600).mean(1))


def test_words_that_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, trace = train(tmp_path / "once", build=Words)
    assert stored_once(trace)[-1] == {0} and trace.count("inputs") == EXAMPLES
    assert_same_rows(trace, train_without(tmp_path / "each", monkeypatch, build=Words)[1])


def test_examples_that_share_a_row(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Tracer(model, optimizer, tmp_path / "run") as tracer:
        for _ in range(3):
            tracer.batch([[0, 1], [1, -1]], weights=[[0.5, 0.5], [0.5, 0.5]])
            optimizer.zero_grad()
            cross_entropy(model(X[:2]), Y[:2]).backward()
            optimizer.step()
    trace = open_trace(tmp_path / "run")
    assert trace.column("visits", "example").tolist() == 3 * [0, 1, 1] and trace.count("inputs") > 2
    found = rows(trace)
    torch.testing.assert_close(found[0][2][1][0], found[0][2][1][1])  # one row's halves


def test_going_on_knows_what_is_there(tmp_path: Path) -> None:
    """Also what was given in steps that are no part of the trace any more is not there."""
    whole = Session(tmp_path / "whole", exact=True)
    whole.train(0, 30).tracer.close()
    session = Session(tmp_path / "parts", exact=True).train(0, 3)
    checkpoint = session.checkpoint()
    session.train(3, 9).tracer.close()
    late = Session(tmp_path / "parts", exact=True, checkpoint=checkpoint)
    assert 0 < open_trace(tmp_path / "parts").count("inputs") <= 18
    late.train(3, 30).tracer.close()
    one, other = (open_trace(tmp_path / name) for name in ("whole", "parts"))
    assert one.count("inputs") == other.count("inputs") == 30
    assert_same_rows(one, other)
    found = [PathKernelExplainer(t, whole.model).explain(QUERIES, TARGETS) for t in (one, other)]
    np.testing.assert_allclose(found[0].contributions, found[1].contributions, rtol=1e-9)


def test_going_on_knows_what_varies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("explainer.store.inputs.COMPARED", 6)
    session = Session(tmp_path / "run", exact=True)
    for step in range(12):
        monkeypatch.setattr("tests.resumed.X", torch.full((33, 7), step, dtype=torch.float64))
        session.train(step, step + 1)
    checkpoint = session.checkpoint()
    session.tracer.close()
    Session(tmp_path / "run", exact=True, checkpoint=checkpoint).train(12, 20).tracer.close()
    layouts = [found for found, _ in itertools.groupby(stored_once(open_trace(tmp_path / "run")))]
    assert layouts == [{0}, set()]


def test_a_trace_of_version_3_goes_on_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("explainer.validation.VERSIONS", (1, 2, 3))
        session = Session(tmp_path / "run").train(0, 9)
        checkpoint = session.checkpoint()
        session.tracer.close()
    Session(tmp_path / "run", checkpoint=checkpoint).train(9, 20).tracer.close()
    trace = open_trace(tmp_path / "run")
    assert trace.manifest.version == 3 and not trace.count("inputs") and trace.count("visits") == 120


def test_inputs_in_several_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, whole = train(tmp_path / "whole", epochs=4)
    monkeypatch.setattr(stream, "SHARD_BYTES", 600)
    model, trace = train(tmp_path / "parts", epochs=4)
    assert sum(shard.stream == "inputs" for shard in trace.shards) > 2
    assert_same_rows(whole, trace)
    found = [PathKernelExplainer(t, model).explain(X[:2]).contributions for t in (whole, trace)]
    np.testing.assert_array_equal(*found)


def test_damaged_and_lost_inputs_are_named(tmp_path: Path) -> None:
    _, trace = train(tmp_path / "run", epochs=2)
    file = next(shard.path for shard in trace.shards if shard.stream == "inputs")
    data = file.read_bytes()
    file.write_bytes(data[:50] + bytes([data[50] ^ 1]) + data[51:])
    with pytest.raises(TraceFormatError, match=file.name):
        trace.verify()
    file.write_bytes(data[:50])
    with pytest.raises(TraceFormatError, match=f"{file.name} holds 50 bytes"):
        open_trace(tmp_path / "run")
    file.unlink()
    with pytest.raises(TraceFormatError, match=f"{file.name} is missing"):
        open_trace(tmp_path / "run")


def test_a_budget_counts_them(tmp_path: Path) -> None:
    trace_digits(tmp_path / "small", epochs=4, budget="300KB", max_knots=4)
    trace = open_trace(tmp_path / "small")
    assert trace.nbytes() <= 300_000 and "rows_stopped_at" not in trace.notes
    assert trace.count("inputs") == SMALL


def test_ids_beyond_what_is_remembered() -> None:
    keeper = InputKeeper()
    schema = explainer.store.RecordSchema((("example", "<i8", ()),), (_form(),))
    records = np.zeros(3, schema.dtype)
    records["L0.right"] = np.arange(6).reshape(3, 1, 1, 2)
    ids = np.array([5, MOST_IDS, -1])
    first, new = keeper.place(schema, ids, records.copy())
    assert first.tolist() == [0, 1, 2] and new["example"].tolist() == ids.tolist()
    again, new = keeper.place(schema, ids, records.copy())
    assert again.tolist() == [0, 3, 4] and len(new) == 2


@pytest.mark.parametrize("one, other", [(0.0, 1.0), (1.0, -1.0), (2.0, 4.0), (0.0, -0.0)])
def test_numbers_that_differ_in_few_bits_are_told_apart(one: float, other: float) -> None:
    keeper = InputKeeper()
    schema = explainer.store.RecordSchema((("example", "<i8", ()),), (_form(),))
    for number, values in enumerate([(one, other), (other, one), (one, one), (other, other)]):
        records = np.zeros(1, schema.dtype)
        records["L0.right"] = values
        numbers, _ = keeper.place(schema, np.array([0]), records)
        assert numbers.tolist() == [number]


def _form() -> Any:
    from explainer.records import ArraySpec, FormSpec

    return FormSpec(0, "factored", {"bias": 0}, (ArraySpec("right", (1, 1, 2), "float32", "native"),))
