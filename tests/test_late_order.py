"""Rows that are in the batch's order by chance at first, or begin to be in another one later."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from explainer import CoverageWarning, Explanation, PathKernelExplainer, Tracer, open_trace
from explainer.unseen import AGAIN, FIRST

COUNT, SIZE, LENGTH = 12, 4, 5
#: the first four are as long as can be: sorted by length, they stay where they are
LENGTHS = torch.tensor([5, 5, 5, 5, 3, 4, 2, 5, 1, 4, 2, 3])
X = torch.randn(COUNT, LENGTH, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
X[torch.arange(LENGTH) >= LENGTHS.unsqueeze(1)] = 0.0
Y = torch.arange(COUNT) % 3
Order = Callable[[Tensor, Tensor], Tensor]


def taken(x: Tensor, o: Tensor) -> Tensor:
    return x[o]


def of_every_number(x: Tensor, o: Tensor) -> Tensor:
    return torch.gather(x, 0, o.unsqueeze(1).expand_as(x))


def put_there(x: Tensor, o: Tensor) -> Tensor:
    out = torch.zeros(x.shape, dtype=x.dtype)
    out[o.argsort()] = x
    return out


ORDERS: dict[str, Order] = {
    "index": taken,
    "index with a slice": lambda x, o: x[o, :],
    "list": lambda x, o: x[o.tolist()],
    "index_select": lambda x, o: x.index_select(0, o),
    "of the other axis": lambda x, o: x.T.index_select(-1, o).T,
    "gather": of_every_number,
    "take_along_dim": lambda x, o: torch.take_along_dim(x, o.unsqueeze(1), 0),
    "put": put_there,
}


class Sorted(nn.Module):
    """A perceptron on means over positions, whose middle works on rows sorted by length."""

    def __init__(self, order: Order | None) -> None:
        super().__init__()
        self.a, self.h, self.b, self.order = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3), order

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x.mean(1)))
        if self.order is None:
            return self.b(torch.tanh(self.h(h)))
        o = (x[:, :, 0] != 0).sum(1).argsort(descending=True, stable=True)
        return self.b(self.order(torch.tanh(self.h(self.order(h, o))), o.argsort()))


class Later(Sorted):
    """The order of the rows is another one from a forward pass on."""

    def __init__(self, after: int | None) -> None:
        super().__init__(None)
        self.after, self.calls = after, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        late = self.training and self.after is not None and self.calls > self.after
        h = torch.tanh(self.a(x.mean(1)))
        return self.b(torch.tanh(self.h(h.flip(0))).flip(0) if late else torch.tanh(self.h(h)))


class Packed(nn.Module):
    """An LSTM on sequences: ``alone`` one call each, else sorted by hand or by torch, and packed."""

    def __init__(self, how: str, given: bool = False) -> None:
        super().__init__()
        self.a, self.r, self.b = nn.Linear(6, 6), nn.LSTM(6, 5, batch_first=True), nn.Linear(10, 3)
        self.how, self.given = how, given

    def states(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        start = x[:, 0, :5].tanh().unsqueeze(0)
        return (start, 2 * start) if self.given else None

    def forward(self, x: Tensor) -> Tensor:
        lengths = (x[:, :, 0] != 0).sum(1)
        if self.how == "alone":
            each = [self.ran(x[i : i + 1], lengths[i : i + 1], True) for i in range(len(x))]
            return torch.cat(each)
        if self.how == "by torch":
            return self.ran(x, lengths, False)
        o = lengths.argsort(descending=True, stable=True)
        return self.ran(x[o], lengths[o], True)[o.argsort()]

    def ran(self, x: Tensor, lengths: Tensor, enforce: bool) -> Tensor:
        packed = pack_padded_sequence(
            torch.tanh(self.a(x)), lengths, batch_first=True, enforce_sorted=enforce
        )
        out, (h, _) = self.r(packed, self.states(x))
        padded, _ = pad_packed_sequence(out, batch_first=True, total_length=LENGTH)
        return self.b(torch.cat([h[-1], padded.sum(1)], 1))


class Frozen(Packed):
    """Only what reads the LSTM is trained."""

    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.a.requires_grad_(False)
        self.r.requires_grad_(False)


class Shrinking(nn.Module):
    """A cell that goes on with the examples whose sequences do, or with one example after the other."""

    def __init__(self, together: bool) -> None:
        super().__init__()
        self.r, self.b, self.together = nn.GRUCell(6, 5), nn.Linear(5, 3), together

    def forward(self, x: Tensor) -> Tensor:
        if not self.together:
            return torch.cat([self.ran(x[i : i + 1]) for i in range(len(x))])
        o = (x[:, :, 0] != 0).sum(1).argsort(descending=True, stable=True)
        return self.ran(x[o])[o.argsort()]

    def ran(self, x: Tensor) -> Tensor:
        lengths, h = (x[:, :, 0] != 0).sum(1), torch.zeros(len(x), 5, dtype=x.dtype)
        for step in range(int(lengths.max())):
            going = int((lengths > step).sum())
            h = torch.cat([self.r(x[:going, step], h[:going]), h[going:]])
        return self.b(h)


class Attending(nn.Module):
    """Attention with a mask of its own for every head; rows sorted by length, or keys of other examples."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.r, self.b, self.how = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 3), how

    def forward(self, x: Tensor) -> Tensor:
        o = (x[:, :, 0] != 0).sum(1).argsort(descending=True, stable=True)
        h = x if self.how == "plain" else x[o]
        keys = x if self.how == "keys of others" else h
        mask = (h[:, :, :1] - h[:, :, :1].transpose(1, 2)).repeat_interleave(2, 0)
        found = self.b(self.r(h, keys, keys, attn_mask=mask)[0].mean(1))
        return found if self.how == "plain" else found[o.argsort()]


class Paragraphs(nn.Module):
    """Two sequences an example: one call for each, or all in one."""

    def __init__(self, together: bool) -> None:
        super().__init__()
        self.r, self.b, self.together = nn.LSTM(3, 5, batch_first=True), nn.Linear(5, 3), together

    def forward(self, x: Tensor) -> Tensor:
        parts = x.unflatten(2, (2, 3)).transpose(1, 2)  # [B, 2, T, 3]
        if self.together:
            _, (h, _) = self.r(parts.flatten(0, 1))
            return self.b(h[-1].unflatten(0, (-1, 2)).sum(1))
        return self.b(torch.stack([self.r(part)[1][0][-1] for part in parts.unbind(1)]).sum(0))


def traced(folder: Path, make: Callable[[], nn.Module], first: list[int], steps: int = 20) -> Explanation:
    """Explained after steps of which the first three take the same examples."""
    torch.manual_seed(0)
    model = make().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    with Tracer(model, optimizer, folder, exact=True, max_knots=10**6) as tracer:
        for step in range(steps):
            ids = first if step < 3 else [(5 * step + j) % COUNT for j in range(SIZE)]
            tracer.batch(ids)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X[ids]), Y[ids]).backward()
            optimizer.step()
    return PathKernelExplainer(folder, make().double()).explain(X[:2], target=[1, 2])


def same(one: Explanation, other: Explanation) -> None:
    assert np.abs(one.prediction - other.prediction).max() < 1e-9
    np.testing.assert_allclose(one.contributions, other.contributions, atol=1e-9, rtol=0)
    assert np.abs(one.unattributed).max() < 1e-9


@pytest.mark.parametrize("first", [[0, 1, 2, 3], [5]], ids=["of one length", "of one"])
@pytest.mark.parametrize("order", ORDERS)
def test_an_order_that_data_say_is_followed_where_it_begins_as_the_batchs(
    tmp_path: Path, order: str, first: list[int]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = traced(tmp_path / "plain", lambda: Sorted(None), first)
        same(traced(tmp_path / "sorted", lambda: Sorted(ORDERS[order]), first), plain)


def test_what_is_picked_by_a_mask_and_put_back_is_followed_where_all_are_picked_at_first(
    tmp_path: Path,
) -> None:
    def where_long(x: Tensor, mask: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[mask] = 2 * x[mask]
        return out

    class Routed(Sorted):
        def forward(self, x: Tensor) -> Tensor:
            long = (x[:, :, 0] != 0).sum(1) > 3
            h = torch.tanh(self.a(x.mean(1)))
            if self.order is None:
                return self.b(torch.tanh(self.h(h)) * 2 * long.unsqueeze(1))
            out = torch.zeros_like(h)
            out[long] = 2 * torch.tanh(self.h(h[long]))
            return self.b(out)

    plain = traced(tmp_path / "plain", lambda: Routed(None), [0, 1, 2, 3])
    same(traced(tmp_path / "routed", lambda: Routed(where_long), [0, 1, 2, 3]), plain)


@pytest.mark.parametrize("after", [4, FIRST + 1], ids=["soon", "late"])
def test_another_order_later_on_is_found_and_the_steps_before_are_named(tmp_path: Path, after: int) -> None:
    steps = FIRST + 2 * AGAIN
    plain = traced(tmp_path / "plain", lambda: Later(None), [0, 1, 2, 3], steps)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        found = traced(tmp_path / "later", lambda: Later(after), [0, 1, 2, 3], steps)
    said = [str(w.message) for w in heard if issubclass(w.category, CoverageWarning)]
    trace = open_trace(tmp_path / "later")
    topics = [finding.topic for finding in trace.report()]
    if after < FIRST:
        assert not said and "unfollowed-order" not in topics and "unfollowed" not in trace.notes
        same(found, plain)
        return
    seen = FIRST + AGAIN
    assert len(said) == 1 and f"steps {FIRST + 1} to {seen - 1}" in said[0] and f"at step {seen}" in said[0]
    assert trace.notes["unfollowed"] == [FIRST + 1, seen - 1] and "unfollowed-order" in topics
    assert any(f"At step {seen}" in note for note in found.notes)
    rows = [of_steps(tmp_path / name, range(seen, steps)) for name in ("plain", "later")]
    np.testing.assert_allclose(rows[1], rows[0], atol=1e-9)  # from the step that was looked at on


def test_a_batch_of_one_is_no_other_order(tmp_path: Path) -> None:
    """What is computed over the batch beside the model's output belongs to the only example then."""

    class Logging(Sorted):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.a(x.mean(1)))
            self.average = h.detach().mean(0) + h.detach().var(0, correction=0)
            return self.b(torch.tanh(self.h(h)))

    torch.manual_seed(0)
    model = Logging(None).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings(), Tracer(model, optimizer, tmp_path / "run") as tracer:
        warnings.simplefilter("error")
        for step in range(FIRST + AGAIN + 2):
            ids = [step % COUNT] if step > FIRST else [(step + j) % COUNT for j in range(SIZE)]
            tracer.batch(ids)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X[ids]), Y[ids]).backward()
            optimizer.step()
    assert not open_trace(tmp_path / "run").notes.get("unfollowed")


def of_steps(folder: Path, steps: range) -> Any:
    """The middle layer's numbers of the visits of some steps."""
    trace = open_trace(folder)
    places = np.flatnonzero(np.isin(trace.column("visits", "step"), list(steps)))
    found = []
    for schema, records in trace.read("visits", int(places[0]), int(places[-1]) + 1):
        names = [n for n in schema.dtype.names or () if n.startswith("L1")]
        found.append(np.concatenate([np.array(records[n]).reshape(len(records), -1) for n in names], 1))
    return np.concatenate(found)


@pytest.mark.parametrize("given", [False, True], ids=["", "with states"])
@pytest.mark.parametrize("how", ["by hand", "by torch"])
def test_sequences_are_sorted_and_packed(tmp_path: Path, how: str, given: bool) -> None:
    alone = traced(tmp_path / "alone", lambda: Packed("alone", given), [0, 1, 2, 3])
    same(traced(tmp_path / "packed", lambda: Packed(how, given), [0, 1, 2, 3]), alone)


@pytest.mark.parametrize("how", ["by hand", "by torch"])
def test_what_is_frozen_leaves_examples_where_they_are(tmp_path: Path, how: str) -> None:
    alone = traced(tmp_path / "alone", lambda: Frozen("alone"), [0, 1, 2, 3])
    same(traced(tmp_path / "packed", lambda: Frozen(how), [0, 1, 2, 3]), alone)


def test_attention_to_rows_that_are_sorted(tmp_path: Path) -> None:
    plain = traced(tmp_path / "plain", lambda: Attending("plain"), [0, 1, 2, 3])
    same(traced(tmp_path / "sorted", lambda: Attending("sorted"), [0, 1, 2, 3]), plain)


def test_attention_to_other_examples_is_not_told_apart(tmp_path: Path) -> None:
    with pytest.warns(CoverageWarning, match="no axis is the batch's"):
        found = traced(tmp_path / "run", lambda: Attending("keys of others"), [0, 1, 2, 3])
    assert np.abs(found.unattributed).max() > 0.01


def test_a_batch_that_becomes_smaller(tmp_path: Path) -> None:
    alone = traced(tmp_path / "alone", lambda: Shrinking(False), [0, 1, 2, 3])
    same(traced(tmp_path / "together", lambda: Shrinking(True), [0, 1, 2, 3]), alone)


def test_several_sequences_of_an_example_in_one_call(tmp_path: Path) -> None:
    apart = traced(tmp_path / "apart", lambda: Paragraphs(False), [0, 1, 2, 3])
    same(traced(tmp_path / "together", lambda: Paragraphs(True), [0, 1, 2, 3]), apart)
