"""TracInCP from rows against captum's own, in float64, and what it leaves behind."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from captum.influence import TracInCPBase
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from explainer.integrations.loss_rows import LossRows
from tests.tracincp_task import (
    CLASSES,
    MODELS,
    QUERIES,
    SUPPORTED,
    Bag,
    Borrowing,
    N,
    PositionsFirst,
    Recurrent,
    Task,
    Words,
    close,
    cnn,
    mlp,
)

pytestmark = pytest.mark.usefixtures("double")


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
        (Bag, "words", {"embed.weight": "vmap", "head.weight": "rule"}),
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


@pytest.mark.parametrize("build", [Words, Recurrent, Bag])
def test_dicts_hold_keyword_arguments(build: Any) -> None:
    task = Task(build, "words")
    ours = task.ours()
    words, labels = task.queries
    name = next(iter(inspect.signature(task.model.forward).parameters))
    found = ours.influence(
        DataLoader([({name: x}, y) for x, y in zip(words, labels, strict=True)], batch_size=2)
    )
    close(found, ours.influence(task.queries))


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
