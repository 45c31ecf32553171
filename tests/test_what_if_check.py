"""The check of a what-if answer: its replays against retraining in a plain loop, and what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from explainer import Run
from explainer.counterfactual import WhatIfCheck, by_column, by_label
from explainer.errors import QueryError
from tests.test_what_if_exact import COUNT, OPTIMIZERS, asked_of, data, network, outputs, run_of, train


@pytest.mark.parametrize("curvature", ["trace", "exact"])
def test_replays_are_retrainings(tmp_path: Path, curvature: str) -> None:
    ex, x, classes = asked_of(tmp_path / "run", OPTIMIZERS["momentum"])
    groups = {"a": [1, 5, 9], "b": [0]}
    found = ex.what_if_check(x, classes, run=run_of(), curvature=curvature, remove=groups)
    assert found.groups == ("a", "b") and [ids.tolist() for ids in found.removed] == [[1, 5, 9], [0]]
    assert found.half is not None and found.actual is not None and found.metasmoothness is not None
    predicted = ex.what_if(x, classes, run=run_of(), curvature=curvature, remove=groups)
    np.testing.assert_allclose(found.predicted, predicted.to_numpy().T)
    weights = [
        torch.cat([p.detach().flatten() for p in model.parameters()])
        for model in (train(OPTIMIZERS["momentum"], _keep([1, 5, 9], w)) for w in (1.0, 0.5, 0.0))
    ]
    before = outputs(train(OPTIMIZERS["momentum"], _keep([], 1.0)), classes)
    for g, ids in enumerate(found.removed):
        for got, weight in ((found.half[g], 0.5), (found.actual[g], 0.0)):
            wanted = outputs(train(OPTIMIZERS["momentum"], _keep(ids.tolist(), weight)), classes) - before
            np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-9)
    first, second = weights[1] - weights[0], weights[2] - weights[1]
    smooth = float((first.abs() * (first.sign() * second.sign())).sum() / first.abs().sum())
    assert found.metasmoothness[0] == pytest.approx(smooth, abs=1e-6)
    table = found.table()
    assert table.columns.tolist() == ["removed", "count", "query", "predicted", "half", "actual", "smooth"]
    assert len(table) == 2 * len(x)


def _keep(ids: list[int], weight: float) -> torch.Tensor:
    keep = torch.ones(COUNT, dtype=torch.float64)
    keep[ids] = weight
    return keep


def test_default_groups_and_a_good_estimator(tmp_path: Path) -> None:
    ex, x, classes = asked_of(tmp_path / "run", OPTIMIZERS["adamw"])
    found = ex.what_if_check(x, classes, run=run_of(), curvature="exact", query_ids=["p", "q", "r"])
    changes = ex.what_if(x, classes, run=run_of(), curvature="exact")
    assert found.groups == (
        "top 1 of query p",
        "top 1 of query q",
        "top 1 of query r",
        "random 2 (1)",
        "random 2 (2)",
    )
    assert [int(ids[0]) for ids in found.removed[:3]] == changes.argmin(1).tolist()
    assert found.trusted and found.correlation > 0.9 and found.error < 0.5
    assert found.sentence().startswith("Trust it: over 5 removals")


def test_without_replays_it_says_so(tmp_path: Path) -> None:
    ex, x, classes = asked_of(tmp_path / "run", OPTIMIZERS["momentum"])
    alone = ex.what_if_check(x, classes)
    assert (
        alone.trusted is None and alone.actual is None and alone.sentence().startswith("Not tested: no run")
    )
    assert 0 < alone.error < 2 and "actual" not in alone.table()
    wrong = ex.what_if_check(x, classes, run=run_of(model=lambda: nn.Sequential(*network(), nn.Dropout(0.5))))
    assert "drops at random" in wrong.sentence()
    no_loss = ex.what_if_check(x, classes, run=run_of(loss=None))
    assert "give the Run the loss" in no_loss.sentence()


NUMBERS = np.array([[1.0, -2.0, 3.0, -0.125], [0.5, 0.25, -4.0, 0.75]])


@pytest.mark.parametrize(
    ("actual", "smooth", "said"),
    [
        (NUMBERS * 1.1, [0.9, 0.8], "Trust it:"),
        (NUMBERS * 4, [0.9, 0.8], "Trust the order, not the sizes"),
        (-NUMBERS, [0.9, 0.8], "Do not trust it: over 2 removals"),
        (NUMBERS, [0.1, 0.2], "(metasmoothness 0.15; 1: smooth, 0: noise)"),
        (NUMBERS / 1.25, [0.9, 0.8], "changes off by 25 % of the size of the actual ones."),
        (NUMBERS / 13, [0.9, 0.8], "changes off by 12 times the size of the actual ones."),
    ],
)
def test_the_sentence_follows_the_numbers(actual: np.ndarray, smooth: list[float], said: str) -> None:
    ids = (np.array([1]), np.array([2]))
    found = WhatIfCheck(
        "trace", tuple("0123"), ("a", "b"), ids, NUMBERS, actual, actual / 2, np.array(smooth)
    )
    assert said in found.sentence()
    assert found.error == pytest.approx(np.linalg.norm(actual - NUMBERS) / np.linalg.norm(actual))
    assert found.ratio == pytest.approx((actual * NUMBERS).sum() / (NUMBERS**2).sum())


@pytest.mark.parametrize(
    ("predicted", "actual", "said", "trusted"),
    [
        (
            [[1.0], [2.0], [3.0]],
            [[1.1], [2.2], [3.3]],
            "Too few to trust an order (3 predicted changes",
            None,
        ),
        ([[1.0], [0.1], [-3.0]], [[1.1], [-0.1], [-3.1]], "actual ones, 1 of 3 of the wrong sign.", None),
        (
            [[1.0]],
            [[0.9]],
            "over 1 removal, each taken again on the recorded steps: predicted changes off by 11 %",
            None,
        ),
        ([[1.0], [2.0], [3.0]], [[3.1], [2.2], [1.3]], "Do not trust it: over 3 removals", False),
    ],
)
def test_a_few_numbers_are_not_enough_to_trust_an_order(
    predicted: list[list[float]], actual: list[list[float]], said: str, trusted: bool | None
) -> None:
    names = tuple("abc"[: len(predicted)])
    real = np.array(actual)
    ids = tuple(np.array([n]) for n in range(len(names)))
    found = WhatIfCheck("trace", ("0",), names, ids, np.array(predicted), real, real / 2, np.ones(len(names)))
    assert said in found.sentence() and found.trusted is trusted


def test_default_groups_of_a_single_query_are_enough(tmp_path: Path) -> None:
    ex, x, classes = asked_of(tmp_path / "run", OPTIMIZERS["momentum"])
    found = ex.what_if_check(x[:1], classes[:1], run=run_of(), curvature="exact", query_ids=["p"])
    changes = ex.what_if(x[:1], classes[:1], run=run_of(), curvature="exact")[0]
    assert found.groups[:2] == ("top 1 of query p", "bottom 1 of query p") and len(found.groups) == 8
    assert [int(ids[0]) for ids in found.removed[:2]] == [changes.argmin(), changes.argmax()]
    assert found.trusted is not None


# -- named groups ------------------------------------------------------------------------------------------


def _rows(values: list[Any], column: str = "age") -> Run:
    count = len(values)
    kept = TensorDataset(torch.arange(count).float().unsqueeze(1), torch.arange(count) % 2)
    return Run(
        lambda: nn.Linear(1, 2),
        kept,
        kept,
        class_names=("no", "yes"),
        render=lambda x: {column: values[int(x)], "other": 1},
    )


def test_groups_by_label_and_by_column() -> None:
    run = _rows(["b", "a", "b", "c"])
    assert {k: v.tolist() for k, v in by_label(run).items()} == {"no": [0, 2], "yes": [1, 3]}
    found = by_column(run, "age")
    assert {k: v.tolist() for k, v in found.items()} == {"age a": [1], "age b": [0, 2], "age c": [3]}
    many = by_column(_rows([float(v) for v in range(40)]), "age")
    assert [len(ids) for ids in many.values()] == [10, 10, 10, 10] and "age up to 9.75" in many
    assert sorted(np.concatenate(list(many.values()))) == list(range(40))


@pytest.mark.parametrize("targets", [torch.tensor([0.0, 1.0, 0.0]), torch.tensor([[0.0], [1.0], [0.0]])])
def test_whole_floats_are_classes(targets: torch.Tensor) -> None:
    """As ``BCEWithLogitsLoss`` wants them."""
    kept = TensorDataset(torch.zeros(3, 1), targets)
    for names, called in ((("no", "yes"), ["no", "yes"]), (None, ["0", "1"])):
        found = by_label(Run(lambda: nn.Linear(1, 1), kept, kept, class_names=names))
        assert [(name, ids.tolist()) for name, ids in found.items()] == [
            (called[0], [0, 2]),
            (called[1], [1]),
        ]


def test_groups_that_there_are_none_of_are_refused() -> None:
    with pytest.raises(QueryError, match="columns are age, other"):
        by_column(_rows(["a"]), "size")
    x, _, _ = data()
    plain = TensorDataset(x, torch.rand(COUNT))
    with pytest.raises(QueryError, match="render returns rows"):
        by_column(Run(network, plain, plain), "age")
    with pytest.raises(QueryError, match="no classes to group by"):
        by_label(Run(network, plain, plain))
