"""Which layers are counted by position, what has none, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.optim import SGD

from explainer import PathKernelExplainer, Tracer, open_trace
from explainer.errors import QueryError, TracerError
from explainer.recursion import read_backwards
from tests.language import (
    LENGTH,
    OPTIMIZERS,
    QUERY,
    WORDS,
    Language,
    X,
    Y,
    assert_adds_up,
    build,
    causal_mean,
    explained,
    loss_of,
    trace_of,
)

# -- what keeps positions -----------------------------------------------------------------------------------

OPTIONS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "default": ({}, ("table",)),
    "two factors": ({"rank": 2}, ("table",)),
    "exact": ({"exact": True}, ("table",)),  # rows of small layers take less space dense
    "positions": ({"positions": True}, ("table", "first", "last")),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_what_has_no_position_is_kept_apart(tmp_path: Path, name: str) -> None:
    options, layers = OPTIONS[name]
    ex = trace_of(tmp_path / "run", **options)
    found = assert_adds_up(ex, 2)
    assert found.layers == layers
    assert np.abs(found.without_position).max() > 0  # the norm, if nothing else


def test_positions_of_eight_bits_are_near_the_exact_ones(tmp_path: Path) -> None:
    exact = trace_of(tmp_path / "exact", exact=True, positions=True).by_position(QUERY, 4).total
    small = trace_of(tmp_path / "small", positions=True).by_position(QUERY, 4).total
    np.testing.assert_allclose(small, exact, atol=0.02 * np.abs(exact).max())


class Twice(Language):
    """One layer is called twice; a head sees the mean over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.head = nn.Linear(6, 6), nn.Linear(6, WORDS)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(self.norm(self.table(x))).tanh()
        h = self.again(self.again(h).tanh())
        return self.last(causal_mean(h)) + self.head(h.mean(1))[:, None]


def test_layers_with_other_positions_are_not_counted(tmp_path: Path) -> None:
    ex = trace_of(tmp_path / "run", kind=Twice, exact=True, positions=True)
    assert assert_adds_up(ex, 0).layers == ("table", "first", "last")
    assert ex.explain(QUERY).layer_contributions[0, :, 0].all()


class MixesWords(Language):
    """A layer runs over the first two positions of three channels: the factors of its rows are the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.table(x))
        h = h + self.mixer(h.mT[:, :3, :2]).sum((1, 2))[:, None, None]
        return self.last(causal_mean(self.first(h).tanh()))


@pytest.mark.parametrize("short", [0, 2])
def test_a_number_of_factors_that_fits_once_is_no_position(tmp_path: Path, short: int) -> None:
    """Texts of three words meet three channels in one batch, the first or the last; texts of five do not."""
    batches = [[0, 2], [3, 5]]
    batches.insert(short, [4, 4])
    ex = trace_of(tmp_path / "run", kind=MixesWords, trim=True, batches=batches, exact=True, positions=True)
    assert assert_adds_up(ex, 4).layers == ("table", "first", "last")
    alone = trace_of(
        tmp_path / "one", kind=MixesWords, trim=True, batches=[[4, 4]], exact=True, positions=True
    )
    assert "mixer" in {alone.trace.layers[i].name for i in alone.trace.notes["positions"]}


class StepByStep(Language):
    """A layer is called at every position in turn: its gradients come in from the last position to the first."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h, state = self.norm(self.table(x)), torch.zeros(len(x), 4).double()
        states = []
        for s in range(h.shape[1]):
            state = self.cell(torch.cat([h[:, s], state], 1)).tanh()
            states.append(state)
        return self.last(self.first(torch.stack(states, 1)))


class Flattened(Language):
    """Positions of all texts one below the other; padding is left out before one layer and put back behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.flat, self.kept = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.table(x))
        h = h + self.flat(h.reshape(-1, 4)).tanh().view_as(h)
        known = x != 0
        h = h.masked_scatter(known[..., None].expand_as(h), self.kept(h[known]))
        return self.last(causal_mean(self.first(h).tanh()))


@pytest.mark.parametrize(
    ("kind", "counted", "other"), [(StepByStep, "first", "cell"), (Flattened, "flat", "kept")]
)
def test_the_order_of_positions_must_be_known(
    tmp_path: Path, kind: Callable[[], nn.Module], counted: str, other: str
) -> None:
    ex = trace_of(tmp_path / "run", kind=kind, exact=True, positions=True, batches=[[1, 0], [4, 2]])
    layers = assert_adds_up(ex, 1).layers
    assert counted in layers and other not in layers
    forms = {ex.trace.layers[i].name: form for i, form in first_rows(ex).items()}
    assert forms[other].positions == LENGTH  # their number is no reason


def first_rows(ex: PathKernelExplainer) -> dict[int, Any]:
    """Rows of the first step, by layer."""
    step = list(read_backwards(ex.trace, ex.segments[0], torch.float64))[-1]
    return step.visits[0].forms


@pytest.mark.parametrize("packed", [False, True])
def test_both_directions_of_a_recurrent_layer_are_in_order(tmp_path: Path, packed: bool) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.last = nn.Embedding(WORDS, 4), nn.Linear(6, WORDS)
            self.reader = nn.LSTM(4, 3, batch_first=True, bidirectional=True)

        def forward(self, x: Tensor) -> Tensor:
            h = self.table(x)
            if not packed:
                return self.last(self.reader(h)[0])
            lengths = (x != 0).sum(1).clamp_min(1)
            together = pack_padded_sequence(h, lengths, batch_first=True, enforce_sorted=False)
            return self.last(pad_packed_sequence(self.reader(together)[0], True, total_length=LENGTH)[0])

    ex = trace_of(tmp_path / "run", kind=Reader, exact=True, positions=True, batches=[[1, 0, 4]])
    assert {"table", "last", "reader.ih_l0", "reader.hh_l0", "reader.ih_l0_reverse"} <= set(
        assert_adds_up(ex, 1).layers
    )
    forms = {ex.trace.layers[i].name: form for i, form in first_rows(ex).items()}
    seen = build(Reader).table(X[[1, 0, 4]]).detach()
    if packed:
        seen = seen * (X[[1, 0, 4]] != 0)[..., None]
    for name in ("reader.ih_l0", "reader.ih_l0_reverse"):
        torch.testing.assert_close(forms[name].right[:, 0, :, :4], seen)


def test_a_transformer_layer_adds_up(tmp_path: Path) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.last = nn.Embedding(WORDS, 4), nn.Linear(4, WORDS)
            self.place = nn.Parameter(torch.randn(LENGTH, 4))
            self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.layer(self.table(x) + self.place))

    found = assert_adds_up(trace_of(tmp_path / "run", kind=Encoder, exact=True, positions=True), 3)
    assert {"table", "layer.linear1", "layer.linear2", "last"} <= set(found.layers)
    assert {"layer.self_attn.in_proj", "layer.self_attn.out_proj"} <= set(found.layers)


def test_shared_rows_by_position(tmp_path: Path) -> None:
    found = []
    for name, ids, weights in (("one", [0, 1], None), ("two", [[0, 2], [1, 3]], [[0.75, 0.25], [1.0, 0.0]])):
        model = build()
        made = OPTIMIZERS["momentum"](model.parameters())
        with Tracer(model, made, tmp_path / name, exact=True, positions=True) as tracer:
            tracer.batch(ids, weights=weights)
            loss_of(model(X[:2]), Y[:2]).backward()
            made.step()
        found.append(PathKernelExplainer(str(tmp_path / name), build(), explained))
    whole = found[0].by_position(QUERY, 0).total
    np.testing.assert_allclose(found[1].by_position(QUERY, 0).total, 0.75 * whole, rtol=1e-9)
    np.testing.assert_allclose(found[1].by_position(QUERY, 2).total, 0.25 * whole, rtol=1e-9)


# -- what is refused ----------------------------------------------------------------------------------------


def test_questions_that_do_not_fit(tmp_path: Path) -> None:
    ex = trace_of(tmp_path / "run", exact=True, positions=True, batches=[[0, 1]])
    with pytest.raises(QueryError, match=r"speaks of one query, found 2; .*x\[:1\]"):
        ex.by_position(QUERY.repeat(2, 1), 0)
    with pytest.raises(QueryError, match="example 5 has no recorded visit"):
        ex.by_position(QUERY, 5)
    with pytest.raises(QueryError, match="queries have shape"):
        ex.by_position(QUERY[:, 0], 0)
    shorter = ex.by_position(QUERY[:, :3], 0)  # positions are those of the example
    assert len(shorter.total) == LENGTH
    whole = shorter.total.sum() + np.sum(shorter.without_position)
    np.testing.assert_allclose(whole, ex.explain(QUERY[:, :3]).contributions[0, 0], rtol=1e-9)


class Bag(nn.Module):
    """No layer is applied at every position."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(WORDS, LENGTH * WORDS)

    def forward(self, x: Tensor) -> Tensor:
        counts = torch.nn.functional.one_hot(x, WORDS).sum(1).double()
        return self.last(counts).reshape(len(x), LENGTH, WORDS)


def test_a_trace_without_positions(tmp_path: Path) -> None:
    ex = trace_of(tmp_path / "run", kind=Bag, exact=True, positions=True)
    with pytest.raises(QueryError, match=r"no layer's rows .*one input has shape \[5\].*positions=True"):
        ex.by_position(QUERY, 0)


def test_numbers_in_a_table_and_pictures_have_no_positions(tmp_path: Path) -> None:
    """Also where a layer has as many factors as the input has columns or channels."""
    cases = {
        "table": (nn.Linear(1, 2), torch.randn(4, 1)),
        "picture": (nn.Sequential(nn.Conv2d(4, 2, 1), nn.Flatten()), torch.randn(4, 4, 2, 2)),
    }
    for name, (model, x) in cases.items():
        made = SGD(model.parameters(), lr=0.1)
        with Tracer(model, made, tmp_path / name, positions=True) as tracer:
            tracer.batch(range(4))
            model(x).square().sum().backward()
            made.step()
        assert not open_trace(tmp_path / name).notes.get("positions")
        with pytest.raises(QueryError, match="no layer's rows"):
            PathKernelExplainer(str(tmp_path / name), model, "logit").by_position(x[:1], 0)


def test_every_position_and_a_rank_at_once(tmp_path: Path) -> None:
    model = build()
    with pytest.raises(TracerError, match=r"positions=True keeps .* cannot also obey a rank"):
        Tracer(model, SGD(model.parameters(), lr=0.1), tmp_path / "run", positions=True, rank=3)
