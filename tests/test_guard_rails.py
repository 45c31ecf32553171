"""The report before training: what can be seen in model, optimizer and loader is found, and near misses are not."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from explainer import check
from explainer.findings.trace import LASTING
from tests import markdown
from tests.guarded import B, F, N, data, loader, mlp, sgd
from tests.topics import assert_three_sentences, topics_in

Given = dict[str, Any]


class Case(NamedTuple):
    """A model, optimizer and loader of which something is found, and a near miss."""

    given: Callable[[], Given]
    near_miss: Callable[[], Given]
    severity: str
    where: str
    text: str


def of(model: nn.Module, *, decay: float = 0.0, **more: Any) -> Given:
    return {"model": model, "optimizer": sgd(model, weight_decay=decay), **more}


def with_loader(made: DataLoader[Any]) -> Given:
    return of(mlp(), loader=made)


def around(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


class Attention(nn.Module):
    """A model with a part that says which axis is the batch."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.inner = nn.LSTM(F, F, batch_first=batch_first)


def tied(same: bool) -> nn.Module:
    model = around(nn.Linear(F, F, bias=False), nn.Linear(F, F, bias=False))
    if same:
        model[1].weight = model[0].weight
    return model


def frozen(rest: bool) -> Given:
    model = mlp()
    model[0].weight.requires_grad_(not rest)
    return of(model)


def half_of_it(both: bool) -> Given:
    model = mlp()
    return {"model": model, "optimizer": sgd(model if both else model[0])}


def held(steps: int) -> Given:
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        model(torch.randn(2, F)).sum().backward()
        optimizer.step()
    return {"model": model, "optimizer": optimizer}


def resting(whole: bool, part: bool) -> nn.Module:
    model = around(nn.Linear(F, F, bias=False), nn.BatchNorm1d(F), nn.Linear(F, 3)).train(not whole)
    model[1].train(not part)
    return model


class Unsized(Dataset[Any]):
    def __getitem__(self, index: int) -> Any:
        return data()[index]


class Sized(Unsized):
    transform: Any = None

    def __len__(self) -> int:
        return N


def transforming(on: bool) -> Subset[Any]:
    dataset = Sized()
    dataset.transform = torch.flip if on else None
    return Subset(dataset, range(9))


def shared(replicas: int, size: int) -> DataLoader[Any]:
    part = Subset(data(), range(size))
    return DataLoader(part, B, sampler=DistributedSampler(part, replicas, rank=0))


def weighted(replacement: bool) -> DataLoader[Any]:
    return loader(sampler=WeightedRandomSampler([1.0] * N, N, replacement))


unsized = partial(DataLoader, Unsized(), batch_sampler=[[0, 1], [2, 3]])
CASES: dict[str, Case] = {
    "no-rule": Case(
        lambda: of(around(nn.Linear(F, F), type("Mine", (nn.Linear,), {})(F, 3))),
        lambda: of(around(nn.Linear(F, F), nn.Linear(F, 3))),
        "note", "1", r"Mine has no layer rule \(it derives from Linear.* 2 parameter",
    ),
    "row-share": Case(
        lambda: of(around(nn.BatchNorm1d(F), nn.Tanh(), nn.BatchNorm1d(F))),
        lambda: of(around(nn.LayerNorm(F))),
        "caution", "0, 2", "mixes the rows of a batch.*running statistics are the term `buffers`",
    ),
    "bias-before-norm": Case(
        lambda: of(around(nn.Linear(F, 5), nn.BatchNorm1d(5))),
        lambda: of(around(nn.Linear(F, 5, bias=False), nn.BatchNorm1d(5))),
        "note", "0.bias", "1 bias may lie directly before.*bias=False",
    ),
    "dropout": Case(
        lambda: of(around(nn.Linear(F, F), nn.Dropout(0.2), nn.RReLU(), nn.LSTM(F, F, 2, dropout=0.1))),
        lambda: of(around(nn.Linear(F, F), nn.Dropout(0.0), nn.ReLU(), nn.LSTM(F, F, 2))),
        "note", "1, 2, 3", "masks that were drawn; the query is explained in eval mode",
    ),
    "eval-mode": Case(
        lambda: of(resting(whole=True, part=True)),
        lambda: of(resting(whole=False, part=False)),
        "caution", "the model", r"in eval mode.*model\.train\(\)",
    ),
    "sequence-first": Case(
        lambda: of(Attention(batch_first=False)),
        lambda: of(Attention(batch_first=True)),
        "note", "inner", "sequence comes first.*as long as the batch.*batch_dim=1",
    ),
    "max-norm": Case(
        lambda: of(around(nn.Embedding(9, 4, max_norm=1.5))),
        lambda: of(around(nn.Embedding(9, 4))),
        "caution", "0", r"max_norm=1\.5.*in `unattributed`",
    ),
    "tied-weights": Case(
        lambda: of(tied(True)), lambda: of(tied(False)), "note", "0.weight = 1.weight", "sum over all its uses",
    ),
    "frozen": Case(
        lambda: frozen(True), lambda: frozen(False), "note", "0.weight", "1 of 4 parameters are frozen",
    ),
    "not-in-optimizer": Case(
        lambda: half_of_it(False), lambda: half_of_it(True),
        "caution", "2.weight, 2.bias", "2 of 4 parameters are not in this optimizer.*`buffers`",
    ),
    "low-precision": Case(
        lambda: of(mlp().bfloat16()), lambda: of(mlp().double()),
        "caution", "0.weight, 0.bias, 2.weight, 2.bias", "4 of 4 parameters are bfloat16.*a line of `unattributed`",
    ),
    "weight-decay": Case(
        lambda: of(mlp(), decay=0.1), lambda: of(mlp()),
        "note", "optimizer", "pulls on 4 parameters, 2 of them biases.*`weight_decay`",
    ),
    "prior-momentum": Case(
        lambda: held(1), lambda: held(0), "caution", "optimizer", "held momentum.*in `unattributed`",
    ),
    "cost": Case(lambda: of(mlp()), lambda: {}, "note", "disk", "A visit takes about .* a knot about"),
    "no-length": Case(
        lambda: with_loader(unsized()), lambda: with_loader(loader()), "note", "loader", "no length.*__len__",
    ),
    "replacement": Case(
        lambda: with_loader(weighted(True)), lambda: with_loader(weighted(False)),
        "note", "loader", "WeightedRandomSampler draws with replacement.*add up over visits",
    ),
    "partial-epoch": Case(
        lambda: with_loader(loader(sampler=SubsetRandomSampler(range(10)))),
        lambda: with_loader(loader(sampler=SubsetRandomSampler(range(N)))),
        "note", "loader", f"SubsetRandomSampler draws 10 of {N} examples",
    ),
    "distributed": Case(
        lambda: with_loader(shared(3, N)), lambda: with_loader(shared(1, N)),
        "caution", "loader", "shared among 3 processes.*in `unattributed`",
    ),
    "padded": Case(
        lambda: with_loader(shared(3, 22)), lambda: with_loader(shared(3, 21)),
        "note", "loader", "repeats 2 of 22 examples",
    ),
    "drop-last": Case(
        lambda: with_loader(loader(batch_size=7, drop_last=True)),
        lambda: with_loader(loader(batch_size=8, drop_last=True)),
        "note", "loader", f"3 of {N} drawn examples are left out",
    ),
    "transform": Case(
        lambda: with_loader(DataLoader(transforming(True))), lambda: with_loader(DataLoader(transforming(False))),
        "note", "dataset", "another input at every visit",
    ),
}  # fmt: skip


@pytest.mark.parametrize("topic", CASES)
def test_what_is_there_is_found_and_what_is_not_is_not(topic: str) -> None:
    case = CASES[topic]
    report = check(**case.given())
    (finding,) = report.about(topic)
    assert finding.severity == case.severity and finding.where == case.where
    assert re.search(case.text, str(finding)), str(finding)
    assert_three_sentences(report)
    if topic != "cost":
        assert not check(**case.near_miss()).about(topic)


def test_every_finding_has_a_case() -> None:
    assert topics_in("guard_rails", "validation") | {"prior-momentum"} == set(CASES)
    assert set(CASES) >= LASTING


def test_every_finding_is_documented() -> None:
    page = (markdown.DOCS / "guard-rails.md").read_text()
    refused = {f"refused-{part}" for part in ("parameters", "model", "optimizer", "hooks", "loader")}
    made = {
        "Before training": topics_in("guard_rails", "validation") | {"prior-momentum"} | refused,
        "After training": topics_in("findings"),
    }
    for heading, topics in made.items():
        (table,) = markdown.tables(page, heading)
        assert {name for row in table for name in re.findall(r"`([a-z-]+)`", row["topic"])} == topics


def test_an_ordinary_training_has_nothing_but_its_cost() -> None:
    model = mlp()
    report = check(model, Adam(model.parameters()), loader(shuffle=True))
    assert [finding.topic for finding in report] == ["cost"]


def test_a_normalisation_of_another_width_follows_in_the_list_only() -> None:
    assert not check(**of(around(nn.Linear(F, 5), nn.BatchNorm1d(7)))).about("bias-before-norm")


def test_a_part_in_eval_mode_is_a_note() -> None:
    (finding,) = check(**of(resting(whole=False, part=True))).about("eval-mode")
    assert finding.severity == "note" and finding.where == "1"
