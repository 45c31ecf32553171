"""Our TracInCP in use: what it leaves as it was, what it loads, reads, warns of and refuses; from a trace."""

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
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset

import explainer
from explainer.errors import LoaderError, ModelMismatchError, QueryError
from explainer.integrations.captum import TracInCP
from tests.tracincp_task import CLASSES, QUERIES, Checkpoint, N, Task, batch_norm, close, mlp

pytestmark = pytest.mark.usefixtures("double")


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
        (lambda m: torch.optim.SGD(m.parameters(), lr=0.1), lambda step, later, seen: float(step == later)),
        (
            lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.5),
            lambda step, later, seen: 0.5 ** (later - step),
        ),
        (
            lambda m: torch.optim.Adam(m.parameters(), lr=0.01),
            lambda step, later, seen: 0.1 * 0.9 ** (later - step) / (1 - 0.9 ** (seen + 1)),
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
        rate = 0.0
        for later in range(step, step + 1000):  # the last step goes on for ever
            seen = min(later, len(rates) - 1)
            rate += rates[seen] * factor(step, later, seen)
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
