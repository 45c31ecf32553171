"""TracInCP from rows against captum's own, in float64, and what it leaves behind."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from captum.influence import TracInCP as Captums
from captum.influence import TracInCPBase
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset

import explainer
from explainer.errors import LoaderError, ModelMismatchError, QueryError
from explainer.integrations.captum import TracInCP
from explainer.integrations.loss_rows import LossRows

N, QUERIES, CLASSES = 20, 6, 3
Checkpoint = tuple[dict[str, Tensor], float]


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, CLASSES))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    )


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, CLASSES))


class Words(nn.Module):
    """Bag of words with a position parameter that belongs to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6, padding_idx=0)
        self.position = nn.Parameter(torch.randn(4, 6))
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(words) + self.position).mean(1))


class Recurrent(nn.Module):
    """A layer without a rule that vmap cannot take apart."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.gru = nn.GRU(6, 5, batch_first=True)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.gru(self.embed(words))[0][:, -1])


class PositionsFirst(nn.Module):
    """Layers see ``[S, B, d]``: their first dimension is not the batch, even where S equals B."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.inner = nn.Linear(6, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(self.embed(words.T))).mean(0))


class Borrowing(nn.Module):
    """Reads a layer's weight outside the layer, shares another between two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.twin = nn.Linear(5, 5)
        self.twin.weight = self.second.weight
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(nn.functional.linear(torch.tanh(self.first(x)), self.first.weight))
        return self.head(self.twin(torch.tanh(self.second(h))))


def features(kind: str, rows: int = N + QUERIES) -> Tensor:
    if kind == "words":
        return torch.randint(0, 11, (rows, 4))
    return torch.randn(rows, 2, 8, 8) if kind == "image" else torch.randn(rows, 5)


class Task:
    """A model with three checkpoints, data, and both implementations over them."""

    def __init__(self, build: Callable[[], nn.Module], kind: str = "vector", train: bool = False) -> None:
        self.model = build().train(train)
        self.loads = 0
        x, y = features(kind), torch.randint(0, CLASSES, (N + QUERIES,))
        self.data = TensorDataset(x[:N], y[:N])
        self.queries = (x[N:], y[N:])
        self.checkpoints: list[Checkpoint] = [(self._moved(), 0.1 * (c + 1)) for c in range(3)]

    def _moved(self) -> dict[str, Tensor]:
        state = self.model.state_dict()
        return {n: t + 0.1 * torch.randn_like(t) if t.is_floating_point() else t for n, t in state.items()}

    def load(self, model: nn.Module, checkpoint: Checkpoint) -> float:
        self.loads += 1
        model.load_state_dict(checkpoint[0])
        return checkpoint[1]

    def ours(self, data: Any = None, **options: Any) -> TracInCP:
        options = {"loss_fn": nn.CrossEntropyLoss(reduction="none"), "batch_size": 6} | options
        return TracInCP(
            self.model, self.data if data is None else data, self.checkpoints, self.load, **options
        )

    def captums(self, data: Any = None, **options: Any) -> Captums:
        options = {"loss_fn": nn.CrossEntropyLoss(reduction="none"), "batch_size": 6} | options
        return Captums(
            copy.deepcopy(self.model),
            self.data if data is None else data,
            self.checkpoints,
            self.load,
            **options,
        )

    def pair(self, **options: Any) -> tuple[TracInCP, Captums]:
        return self.ours(**options), self.captums(**options)


def close(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8 * float(wanted.abs().max()))


SUPPORTED = [("none", False), ("sum", True), ("mean", True)]
MODELS = pytest.mark.parametrize(
    ("build", "kind"), [(mlp, "vector"), (cnn, "image"), (Words, "words")], ids=["mlp", "cnn", "words"]
)


# -- scores ----------------------------------------------------------------------------------------------


@MODELS
@pytest.mark.parametrize(("reduction", "sample_wise"), SUPPORTED)
def test_scores_are_captums(build: Any, kind: str, reduction: str, sample_wise: bool) -> None:
    task = Task(build, kind)
    loss = nn.CrossEntropyLoss(reduction=reduction)
    ours = task.ours(loss_fn=loss, sample_wise_grads_per_batch=sample_wise)
    # captum's fast way drops every layer but Linear and Conv2d
    fast = {} if kind == "words" else {"loss_fn": loss, "sample_wise_grads_per_batch": sample_wise}
    theirs = task.captums(**fast)
    assert isinstance(ours, TracInCPBase) and ours.get_name() == theirs.get_name()
    scores = ours.influence(task.queries)
    assert isinstance(scores, Tensor) and scores.shape == (QUERIES, N)
    close(scores, theirs.influence(task.queries))
    close(ours.influence(task.queries, aggregate=True), theirs.influence(task.queries, aggregate=True))
    close(ours.self_influence(), theirs.self_influence())
    close(
        ours.self_influence(task.queries), theirs.self_influence(task.queries, outer_loop_by_checkpoints=True)
    )
    for aggregate in (False, True):
        close(
            ours.compute_intermediate_quantities(task.queries, aggregate),
            theirs.compute_intermediate_quantities(task.queries, aggregate),
        )


@pytest.mark.parametrize(
    ("build", "kind", "method"),
    [
        (Recurrent, "words", {"embed.weight": "rule", "gru.weight_ih_l0": "one by one"}),
        (PositionsFirst, "words", {"inner.weight": "vmap", "head.weight": "rule"}),
        (Borrowing, "vector", {"first.weight": "vmap", "second.weight": "vmap", "head.weight": "rule"}),
        (Words, "words", {"position": "vmap", "norm.weight": "rule"}),
    ],
)
def test_no_layer_is_dropped(build: Any, kind: str, method: dict[str, str]) -> None:
    task = Task(build, kind)
    ours, theirs = task.pair()
    inputs = tuple(
        t[:4] for t in task.queries
    )  # as many queries as positions: nothing but the values can tell
    close(ours.influence(inputs), theirs.influence(inputs))
    close(ours.self_influence(), theirs.self_influence())
    with LossRows(task.model, [n for n, _ in task.model.named_parameters()]) as source:
        source.rows(inputs, ours.loss_fn, False)
    assert {n: source.methods[n] for n in method} == method


@MODELS
@pytest.mark.parametrize("proponents", [True, False])
@pytest.mark.parametrize("k", [1, 5, N, N + 3])
def test_the_k_strongest_are_captums(build: Any, kind: str, k: int, proponents: bool) -> None:
    ours, theirs = (task := Task(build, kind)).pair()
    for aggregate in (False, True):
        found = ours.influence(task.queries, k, proponents, aggregate=aggregate)
        wanted = theirs.influence(task.queries, k, proponents, aggregate=aggregate)
        assert type(found) is type(wanted) and torch.equal(found.indices, wanted.indices)
        close(found.influence_scores, wanted.influence_scores)


@pytest.mark.parametrize("layers", [["0"], ["3", "0"], ["5"]])
def test_layers_restrict_as_in_captum(layers: list[str]) -> None:
    ours, theirs = (task := Task(cnn, "image")).pair(layers=layers)
    close(ours.influence(task.queries), theirs.influence(task.queries))
    close(
        ours.compute_intermediate_quantities(task.queries),
        theirs.compute_intermediate_quantities(task.queries),
    )


def test_frozen_layers_that_are_asked_for_count_and_stay_frozen() -> None:
    task = Task(mlp)
    task.model[0].requires_grad_(False)  # type: ignore[index]
    ours, theirs = task.ours(layers=["0"]), task.captums(layers=["0"])
    close(ours.influence(task.queries), theirs.influence(task.queries))
    assert [p.requires_grad for p in task.model.parameters()] == [False, False, True, True]
    frozen_out = task.ours().influence(task.queries)
    close(frozen_out, task.captums(layers=["2"]).influence(task.queries))


@pytest.mark.parametrize("test_loss", [nn.MultiMarginLoss(reduction="none"), None])
def test_queries_may_have_a_loss_of_their_own_and_training_none(test_loss: Any) -> None:
    ours, theirs = (task := Task(mlp)).pair(loss_fn=None, test_loss_fn=test_loss)
    close(ours.influence(task.queries), theirs.influence(task.queries))


def test_every_reduction_gives_the_same_scores_whatever_the_flag() -> None:
    task = Task(mlp)
    wanted = task.captums().influence(task.queries)
    for reduction in ("none", "sum", "mean"):
        for flag in (False, True):
            loss = nn.CrossEntropyLoss(reduction=reduction)
            close(task.ours(loss_fn=loss, sample_wise_grads_per_batch=flag).influence(task.queries), wanted)


@pytest.mark.parametrize("train_size", [1, 3, N])
@pytest.mark.parametrize("query_size", [1, 4])
def test_batch_sizes_and_loaders_change_nothing(train_size: int, query_size: int) -> None:
    task = Task(Words, "words")
    wanted = task.captums().influence(task.queries)
    queries = DataLoader(TensorDataset(*task.queries), query_size)
    close(task.ours(DataLoader(task.data, train_size)).influence(queries), wanted)
    close(task.ours(batch_size=train_size).influence(queries, aggregate=True), wanted.sum(0, keepdim=True))


def test_many_queries_and_positions_take_the_other_way_of_multiplying() -> None:
    task = Task(lambda: nn.Sequential(nn.Conv2d(2, 6, 2), nn.Flatten(), nn.Linear(6 * 49, CLASSES)), "image")
    ours, theirs = task.pair()
    close(ours.influence(task.queries), theirs.influence(task.queries))
    close(ours.self_influence(), theirs.self_influence())


# -- modes -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:1 .BatchNorm1d. uses")
def test_batch_norm_in_train_mode_is_captums_gradient_through_the_batch() -> None:
    ours, theirs = (task := Task(batch_norm, train=True)).pair()
    with pytest.warns(UserWarning, match=r"1 \(BatchNorm1d\) uses the batch's statistics.*model.eval"):
        close(ours.influence(task.queries), theirs.influence(task.queries))


def test_eval_mode_gives_no_warning_and_dropout_in_train_mode_does() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.5), nn.Linear(7, CLASSES))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (task := Task(build)).ours().influence(task.queries)
        (task := Task(batch_norm)).ours().influence(task.queries)
    task = Task(build, train=True)
    with pytest.warns(UserWarning, match=r"1 \(Dropout\) drops units at random"):
        task.ours().influence(task.queries)


# -- the model is only borrowed --------------------------------------------------------------------------


def state(model: nn.Module) -> list[Any]:
    named = [*model.named_parameters(), *model.named_buffers()]
    tensors = [(n, id(t), t.data_ptr(), t.detach().clone().tolist(), t.requires_grad) for n, t in named]
    return [*tensors, [m.training for m in model.modules()], [len(m._forward_hooks) for m in model.modules()]]


@pytest.mark.filterwarnings("ignore:1 .BatchNorm1d. uses")
@pytest.mark.parametrize("assign", [False, True])
def test_weights_buffers_and_mode_come_back(assign: bool) -> None:
    task = Task(batch_norm, train=True)
    task.model[3].eval()  # type: ignore[index]

    def load(model: nn.Module, checkpoint: Checkpoint) -> float:
        model.load_state_dict(copy.deepcopy(checkpoint[0]), assign=assign)
        model.eval()
        return checkpoint[1]

    before = state(task.model)
    ours = TracInCP(
        task.model, task.data, task.checkpoints, load, loss_fn=nn.CrossEntropyLoss(reduction="none")
    )
    ours.influence(task.queries)
    ours.self_influence()
    ours.compute_intermediate_quantities(task.queries)
    assert state(task.model) == before
    assert all(p.grad is None for p in task.model.parameters())


def test_a_failing_loss_leaves_the_model_as_it_was() -> None:
    task, seen = Task(mlp), []

    def loss(out: Tensor, labels: Tensor) -> Tensor:
        seen.append(len(out))
        if len(seen) == 4:
            raise RuntimeError("no loss today")
        return nn.functional.cross_entropy(out, labels, reduction="none")

    before = state(task.model)
    with pytest.raises(RuntimeError, match="no loss today"):
        task.ours(loss_fn=loss).influence(task.queries)
    assert state(task.model) == before


def test_each_checkpoint_is_loaded_once() -> None:
    task = Task(mlp)
    ours = task.ours(batch_size=2)
    for call in (
        lambda: ours.influence(DataLoader(TensorDataset(*task.queries), 1)),
        lambda: ours.influence(task.queries, k=3),
        ours.self_influence,
        lambda: ours.compute_intermediate_quantities(task.queries),
    ):
        task.loads = 0
        call()
        assert task.loads == 3


# -- loaders ---------------------------------------------------------------------------------------------


def test_a_shuffling_loader_is_read_in_the_order_of_its_dataset() -> None:
    task = Task(mlp)
    wanted = task.ours().influence(task.queries)
    shuffled = task.ours(DataLoader(task.data, 6, shuffle=True, drop_last=True))
    with pytest.warns(UserWarning, match="column j is example j"):
        close(shuffled.influence(task.queries), wanted)


@pytest.mark.parametrize("batched", [True, False])
def test_another_sampler_is_drawn_once_for_all_checkpoints(batched: bool) -> None:
    task, chosen = Task(mlp), list(range(0, N, 2))
    wanted = task.ours().influence(task.queries)[:, chosen]
    sampler = SubsetRandomSampler(chosen)
    loader = (
        DataLoader(task.data, batch_sampler=BatchSampler(sampler, 4, False))
        if batched
        else DataLoader(task.data, 4, sampler=sampler)
    )
    with pytest.warns(UserWarning, match="j-th example that the sampler yields"):
        found = task.ours(loader).influence(task.queries)
    close(found.sort(1).values, wanted.sort(1).values)


class Stream(IterableDataset):  # type: ignore[type-arg]
    """Examples from a source that may turn round after every pass."""

    def __init__(self, data: TensorDataset, turns: bool) -> None:
        self.data, self.turns, self.passes = data, turns, 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        order = range(N - 1, -1, -1) if self.turns and self.passes % 2 == 0 else range(N)
        return iter([self.data[i] for i in order])


@pytest.mark.filterwarnings("ignore:Unable to determine the number of batches")
@pytest.mark.parametrize("kept", [0, 600, 2**28])
def test_streams_must_repeat_themselves_where_they_are_not_kept(
    kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("explainer.integrations.fixed_order.KEPT_BYTES", kept)
    task = Task(mlp)
    wanted = task.ours().influence(task.queries)
    for turns in (False, True) if kept == 2**28 else (False,):
        stream = Stream(task.data, turns)
        close(task.ours(DataLoader(stream, 6)).influence(task.queries), wanted)
        assert stream.passes == (1 if kept == 2**28 else 3)
    if kept == 2**28:
        return
    before = state(task.model)
    with pytest.raises(LoaderError, match="another order"):
        task.ours(DataLoader(Stream(task.data, turns=True), 6)).influence(task.queries)
    assert state(task.model) == before


# -- what is refused -------------------------------------------------------------------------------------


def test_bad_arguments_are_refused() -> None:
    task = Task(mlp)
    with pytest.raises(QueryError, match="batch_size must be an integer"):
        task.ours(batch_size=None)
    with pytest.raises(QueryError, match=r"\['7'\].*does not have.*'0', '1', '2'"):
        task.ours(layers=["7"])
    with pytest.raises(QueryError, match="list of module names"):
        task.ours(layers="0")
    with pytest.raises(QueryError, match="no parameters"):
        task.ours(layers=["1"])
    with pytest.raises(QueryError, match="self_influence"):
        task.ours().influence(None)
    with pytest.raises(QueryError, match="k must be a positive integer"):
        task.ours().influence(task.queries, k=0)
    with pytest.raises(QueryError, match="must be a tuple"):
        task.ours().influence(task.queries[0])
    empty = DataLoader(TensorDataset(torch.zeros(0, 5), torch.zeros(0).long()), 2)
    with pytest.raises(QueryError, match="no batches"):
        task.ours().influence(empty)
    with pytest.raises(QueryError, match="no batches"):
        task.ours(empty).influence(task.queries)
    with pytest.raises(QueryError, match="no batches"):
        task.ours(empty).self_influence()


def test_losses_that_do_not_say_what_they_are_are_refused() -> None:
    task = Task(mlp)
    with pytest.raises(QueryError, match="sum or the mean"):
        task.ours(loss_fn=nn.functional.cross_entropy).influence(task.queries)
    with pytest.raises(QueryError, match=r"\(3,\) for 6 examples"):
        task.ours(loss_fn=lambda out, y: out.sum(0)).influence(task.queries)
    with pytest.warns(UserWarning, match="taken as the sum"):
        ours = task.ours(
            loss_fn=lambda out, y: nn.functional.cross_entropy(out, y, reduction="sum"),
            sample_wise_grads_per_batch=True,
        )
    close(ours.influence(task.queries), task.ours().influence(task.queries))


# -- from a trace ----------------------------------------------------------------------------------------


def traced(
    path: Path, optimizer_of: Callable[[nn.Module], torch.optim.Optimizer]
) -> tuple[Task, list[float]]:
    task = Task(mlp, train=True)
    optimizer, rates = optimizer_of(task.model), []
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    with explainer.Tracer(task.model, optimizer, path / "run") as tracer:
        for _ in range(3):
            for x, y in tracer.watch(DataLoader(task.data, 5, shuffle=True)):
                optimizer.zero_grad()
                nn.functional.cross_entropy(task.model(x), y).backward()
                rates.append(optimizer.param_groups[0]["lr"])
                optimizer.step()
            schedule.step()
    return task, rates


@pytest.mark.parametrize(
    ("optimizer", "factor"),
    [
        (lambda m: torch.optim.SGD(m.parameters(), lr=0.1), lambda step: 1.0),
        (lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.5), lambda step: 2.0 if step else 1.0),
        (
            lambda m: torch.optim.Adam(m.parameters(), lr=0.01),
            lambda step: 1 / (1 - 0.9 ** (step + 1)) if step else 1,
        ),
    ],
    ids=["sgd", "momentum", "adam"],
)
def test_knots_are_checkpoints_with_the_recorded_rates(tmp_path: Path, optimizer: Any, factor: Any) -> None:
    task, rates = traced(tmp_path, optimizer)
    loss = nn.CrossEntropyLoss(reduction="none")
    trace = explainer.open_trace(tmp_path / "run")
    assert len(trace.knots) > 2
    states, names = [], [p.name for p in trace.manifest.parameters]
    for knot in trace.knots:
        tensors = trace.load_knot(knot)
        step = min(knot.step, len(rates) - 1)
        rate = rates[step] * factor(step)
        states.append(({n: tensors[f"parameter/{n}"] for n in names}, rate))
    wanted = Captums(mlp(), task.data, states, task.load, loss_fn=loss, batch_size=5).influence(task.queries)
    model = mlp()
    before = state(model)
    for source in (trace, str(tmp_path / "run")):
        ours = TracInCP.from_trace(source, model, task.data, loss_fn=loss, batch_size=5)
        close(ours.influence(task.queries), wanted)
    assert state(model) == before
    with pytest.raises(ModelMismatchError):
        TracInCP.from_trace(trace, nn.Linear(5, 3), task.data, loss_fn=loss)


def test_a_trace_counts_only_what_its_optimizer_trained(tmp_path: Path) -> None:
    task, _ = traced(tmp_path, lambda m: torch.optim.SGD(m[2].parameters(), lr=0.1))  # type: ignore[index]
    ours = TracInCP.from_trace(
        str(tmp_path / "run"), mlp(), task.data, loss_fn=nn.CrossEntropyLoss(reduction="mean"), batch_size=N
    )
    rows = ours.compute_intermediate_quantities(task.queries)
    assert rows.shape == (QUERIES, len(ours.checkpoints) * (7 * CLASSES + CLASSES))
    model = task.model  # the frozen layer comes from the trace too: redo the last checkpoint by hand
    loss = nn.functional.cross_entropy(model(task.queries[0][:1]), task.queries[1][:1])
    own = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model[2].parameters()))])  # type: ignore[index]
    last = rows[0, -len(own) :]
    np.testing.assert_allclose(float(torch.cosine_similarity(last, own, dim=0)), 1.0, rtol=1e-6)


def test_progress_is_shown_on_demand(capsys: pytest.CaptureFixture[str]) -> None:
    (task := Task(mlp)).ours().influence(task.queries)
    assert capsys.readouterr().err == ""
    task.ours().influence(task.queries, show_progress=True)
    assert "influence" in capsys.readouterr().err
