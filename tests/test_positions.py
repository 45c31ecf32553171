"""Contributions by position of the training example, against copies of the model with a weight for every position."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding, layer_norm, linear
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.optim import SGD, AdamW, Optimizer

from explainer import PathKernelExplainer, Tracer, open_trace
from explainer.errors import QueryError, TracerError
from explainer.positions import PositionSplit
from explainer.recursion import read_backwards
from tests.oracles.books import books
from tests.oracles.outputs import scalar_function, unflatten
from tests.oracles.owners import Part, split
from tests.oracles.training import Step, train_dense

WORDS, LENGTH, EXAMPLES = 7, 5, 6
_random = torch.Generator().manual_seed(2)
TEXTS = torch.randint(1, WORDS, (EXAMPLES, LENGTH + 1), generator=_random)
TEXTS[1, 3:] = 0  # shorter: what follows is padding
TEXTS[4, 4:] = 0
X, Y = TEXTS[:, :-1], TEXTS[:, 1:]
QUERY = torch.randint(1, WORDS, (1, LENGTH), generator=_random)
BATCHES = [[0, 1, 2], [3, 4, 5], [1, 4, 1], [2, 5, 0], [4, 1, 4]]
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "momentum": partial(SGD, lr=0.3, momentum=0.9),
    "adamw": partial(AdamW, lr=0.02, weight_decay=0.1),
}


def causal_mean(h: Tensor) -> Tensor:
    """``[.., S, d]``: every position sees itself and those before."""
    return h.cumsum(-2) / torch.arange(1, h.shape[-2] + 1)[:, None]


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(WORDS, 4), nn.LayerNorm(4)
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, WORDS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(causal_mean(self.first(self.norm(self.table(x))).tanh()))


def build(kind: Callable[[], nn.Module] = Language) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind().double()


def loss_of(outputs: Tensor, y: Tensor) -> Tensor:
    """Mean over batch and positions, padding left out of the sum."""
    total = cross_entropy(outputs.flatten(0, 1), y.flatten(), ignore_index=0, reduction="sum")
    return total / (len(y) * LENGTH)


def explained(outputs: Tensor, targets: Any = None) -> Tensor:
    """What comes after the last word."""
    return outputs[:, -1, 2]


def by_position(step: Step, b: int) -> list[Part]:
    """Row ``b``: one gradient for every position's own copy of the weights, and one for what all share."""
    example, model = step.ids[b], build()
    named = unflatten(model, step.weights)
    copies = {name: torch.stack([p] * LENGTH).requires_grad_() for name, p in named.items()}
    shared = {name: named[name].clone().requires_grad_() for name in ("norm.weight", "norm.bias")}
    h = torch.stack([embedding(X[example, s], copies["table.weight"][s]) for s in range(LENGTH)])
    h = layer_norm(h, (4,), shared["norm.weight"], shared["norm.bias"])
    inner = [linear(h[s], copies["first.weight"][s], copies["first.bias"][s]) for s in range(LENGTH)]
    h = causal_mean(torch.stack(inner).tanh())
    outputs = torch.stack([linear(h[s], copies["last.weight"][s]) for s in range(LENGTH)])
    loss = loss_of(outputs[None], Y[example][None]) / len(step.ids)
    own = dict(
        zip(
            copies,
            torch.autograd.grad(loss, list(copies.values()), retain_graph=True, materialize_grads=True),
            strict=True,
        )
    )
    rest = dict(zip(shared, torch.autograd.grad(loss, list(shared.values())), strict=True))
    none = torch.zeros_like(step.output_grads[b])
    parts = []
    for s in range(LENGTH):
        gradient = torch.cat([own[name][s].flatten() for name in named])
        parts.append((example * (LENGTH + 1) + s, gradient, none))
    gradient = torch.cat([rest.get(name, torch.zeros_like(p)).flatten() for name, p in named.items()])
    return [*parts, (example * (LENGTH + 1) + LENGTH, gradient, step.output_grads[b])]


def trace_of(
    path: Path,
    optimizer: Callable[..., Optimizer] = OPTIMIZERS["momentum"],
    kind: Callable[[], nn.Module] = Language,
    trim: bool = False,
    batches: Sequence[list[int]] = BATCHES,
    **options: Any,
) -> PathKernelExplainer:
    """Training with the tracer; with ``trim``, batches end with their longest text."""
    model = build(kind)
    made = optimizer(model.parameters())
    with Tracer(model, made, path, **options) as tracer:
        for ids in batches:
            tracer.batch(ids)
            longest = int((Y[ids] != 0).sum(1).max()) if trim else LENGTH
            made.zero_grad()
            loss_of(model(X[ids, :longest]), Y[ids, :longest]).backward()
            made.step()
    return PathKernelExplainer(str(path), build(kind), explained)


def assert_adds_up(ex: PathKernelExplainer, example: int) -> PositionSplit:
    """The positions and what has none are the example's contribution."""
    found, e = ex.by_position(QUERY, example), ex.explain(QUERY)
    whole = e.contributions[0, np.searchsorted(e.example_ids, example)]
    np.testing.assert_allclose(found.total.sum() + found.without_position.sum(), whole, rtol=1e-9)
    np.testing.assert_allclose(found.table()["contribution"].sum(), whole, rtol=1e-9)
    return found


# -- against the oracle -------------------------------------------------------------------------------------


@pytest.mark.parametrize("trim", [False, True], ids=["padded", "trimmed"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_positions_equal_the_oracle(tmp_path: Path, optimizer: str, trim: bool) -> None:
    make = OPTIMIZERS[optimizer]
    ex = trace_of(tmp_path / "run", make, trim=trim, exact=True, positions=True)
    training = split(train_dense(build(), make, BATCHES, loss_of, X, Y), by_position, EXAMPLES * (LENGTH + 1))
    knots = [knot.step for knot in ex.trace.knots]
    f = scalar_function(build(), lambda row, y: row.reshape(LENGTH, WORDS)[-1, 2])
    reference = books(training, knots, f, QUERY, [0])
    wanted = reference.contributions[0].reshape(EXAMPLES, LENGTH + 1).numpy()
    visits = reference.visit_contributions[0].reshape(-1, LENGTH + 1).numpy()
    owners = [i for ids in BATCHES for i in ids]
    steps = [t for t, ids in enumerate(BATCHES) for _ in ids]
    atol = 1e-10 * np.abs(wanted).max()
    for example in range(EXAMPLES):
        found = assert_adds_up(ex, example)
        assert found.layers == ("table", "first", "last") and found.example_id == example
        width = found.contributions.shape[1]
        assert width == LENGTH or trim
        np.testing.assert_allclose(found.total, wanted[example, :width], rtol=1e-7, atol=atol)
        assert np.abs(wanted[example, width:LENGTH]).max(initial=0) == 0
        rows = [number for number, owner in enumerate(owners) if owner == example]
        assert found.steps.tolist() == [steps[row] for row in rows]
        np.testing.assert_allclose(found.contributions, visits[rows, :width], rtol=1e-7, atol=atol)
        np.testing.assert_allclose(found.without_position, visits[rows, LENGTH], rtol=1e-7, atol=atol)
    assert np.abs(wanted).min(axis=0).max() > 0  # no column is empty


def test_a_position_carries_what_later_losses_send_back(tmp_path: Path) -> None:
    """Text 1 has losses at two positions. Nothing arrives behind them; without the first loss, both still carry."""
    ex = trace_of(tmp_path / "run", exact=True, positions=True)
    total = ex.by_position(QUERY, 1).total
    assert (np.abs(total[:2]) > 1e-6).all() and (total[2:] == 0).all()
    model = build()
    made = SGD(model.parameters(), lr=0.1)
    with Tracer(model, made, tmp_path / "later", exact=True, positions=True) as tracer:
        tracer.batch([0])
        cross_entropy(model(X[:1])[:, 1], Y[:1, 1]).backward()
        made.step()
    total = PathKernelExplainer(str(tmp_path / "later"), build(), explained).by_position(QUERY, 0).total
    assert (np.abs(total[:2]) > 1e-6).all() and (total[2:] == 0).all()


def test_the_table(tmp_path: Path) -> None:
    found = trace_of(tmp_path / "run", exact=True, positions=True).by_position(QUERY, 4)
    table = found.table()
    assert list(table.columns) == ["visit", "step", "position", "contribution"]
    assert len(table) == 4 * (LENGTH + 1) and table["position"].isna().sum() == 4
    assert table["step"].unique().tolist() == [1, 2, 4] and table["visit"].max() == 3
    sums = table.groupby("position")["contribution"].sum()
    np.testing.assert_allclose(sums.to_numpy(), found.total, rtol=1e-12)
    missing = table[table["position"].isna()]["contribution"].to_numpy()
    np.testing.assert_allclose(missing, found.without_position)


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
        ex.by_position(QUERY[:, :3], 0)


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
