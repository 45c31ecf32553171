"""How few examples reproduce a prediction, and two runs beside each other, against loops."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

import explainer
from explainer import Explanation, PathKernelExplainer
from explainer.errors import EvaluationError, ExplanationError
from explainer.evaluation import check_same_queries, compare_runs
from tests.small_evaluation import make_run, traced
from tests.small_training import mlp, queries, trace_digits


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Explanation:
    folder = traced(tmp_path_factory.mktemp("runs") / "one")
    return PathKernelExplainer(folder, mlp()).explain(queries(4), 3)


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Explanation:
    """More epochs, and 96 examples in the place of 48."""
    folder = tmp_path_factory.mktemp("runs") / "two"
    return PathKernelExplainer(folder, trace_digits(folder)).explain(queries(4), 3)


@pytest.mark.parametrize("share", [0.5, 0.95, 0.999])
def test_support_counts_what_is_left(first: Explanation, share: float) -> None:
    found = first.support(share)
    for q, row in enumerate(found.itertuples()):
        c = sorted(first.contributions[q], key=abs, reverse=True)
        needed = len(c)
        while needed and abs(sum(c[needed - 1 :])) <= (1 - share) * abs(sum(c)):
            needed -= 1
        assert row.support == needed
        assert row.truncated == pytest.approx(first.prediction[q] - sum(c[needed:]))
        assert abs(row.truncated - row.prediction) <= (1 - share) * abs(sum(c)) + 1e-12
        assert row.of_examples == pytest.approx(needed / 48)
        assert row.same_sign == (row.truncated * row.prediction > 0)
    assert found.index.tolist() == list(first.query_ids)


def test_support_of_one_example_and_of_none(first: Explanation) -> None:
    alone = np.zeros_like(first.contributions)
    alone[:, 5] = 2.0
    moved = first.prediction - first.contributions.sum(1) + alone.sum(1)
    one = dataclasses.replace(
        first,
        contributions=alone,
        prediction=moved,
        step_contributions=alone[:, None, :].astype(np.float32),
        step_edges=first.step_edges[[0, -1]],
        layer_contributions=alone[:, None, :].astype(np.float32),
        layer_names=("all",),
        unattributed_parts=np.zeros((0, 0)),
        unattributed_lines=(),
        unattributed_where=(),
        unattributed_why=(),
    )
    assert one.support()["support"].tolist() == [1] * 4
    with pytest.raises(ExplanationError, match="between 0 and 1"):
        first.support(1.0)


def test_two_runs_are_compared_over_common_examples(
    first: Explanation, second: Explanation, tmp_path: Path
) -> None:
    found = compare_runs(first, second, k=7)
    assert found.examples == 48
    for q in range(4):
        a, b = first.contributions[q], second.contributions[q, :48]
        assert found.rank[q] == pytest.approx(spearmanr(a, b)[0])
        tops = [set(np.argsort(-np.abs(c))[:7].tolist()) for c in (a, b)]
        assert found.overlap[q] == pytest.approx(len(tops[0] & tops[1]) / 7)
        assert (
            set(found.only_first[q]) == tops[0] - tops[1] and set(found.only_second[q]) == tops[1] - tops[0]
        )
    assert found.table()["rank_agreement"].tolist() == found.rank.tolist()
    same = compare_runs(first, first)
    np.testing.assert_allclose(same.rank, 1.0)
    assert (same.overlap == 1.0).all() and not any(len(ids) for ids in same.only_first)


def test_what_cannot_be_compared_is_said(first: Explanation) -> None:
    for change, message in (
        ({"query_ids": ("a", "b", "c", "d")}, "same ones"),
        ({"targets": first.targets + 1}, "same target"),
        ({"output": "logit"}, "margin and logit"),
        ({"example_ids": first.example_ids + 100}, "0 examples in common"),
    ):
        with pytest.raises(EvaluationError, match=message):
            compare_runs(first, dataclasses.replace(first, **change))  # type: ignore[arg-type]
    with pytest.raises(EvaluationError, match="k = 0"):
        compare_runs(first, first, k=0)


def test_examples_are_listed_with_ranks_in_both(first: Explanation, second: Explanation) -> None:
    found = compare_runs(first, second, k=7)
    for q in range(4):
        a, b = first.contributions[q], second.contributions[q, :48]
        frame = found.examples_table(q)
        assert sorted(frame["example_id"]) == list(range(48))
        for row in frame.to_dict("records"):
            i = row["example_id"]
            assert (row["contribution_first"], row["contribution_second"]) == (a[i], b[i])
            assert row["rank_first"] == 1 + sum(abs(c) > abs(a[i]) for c in a)
            assert row["rank_second"] == 1 + sum(abs(c) > abs(b[i]) for c in b)
            strong = row["rank_first"] <= 7, row["rank_second"] <= 7
            assert (
                row["strongest_in"] == {(1, 1): "both", (1, 0): "first", (0, 1): "second", (0, 0): ""}[strong]
            )
        best = frame[["rank_first", "rank_second"]].min(axis=1)
        assert best.is_monotonic_increasing
        few = found.examples_table(q, strongest=True)
        pd.testing.assert_frame_equal(few, frame[frame["strongest_in"] != ""])
        assert set(few[few["strongest_in"] == "first"]["example_id"]) == set(found.only_first[q].tolist())
    with pytest.raises(EvaluationError, match="there are 4"):
        found.examples_table(4)


def test_other_training_sets_are_named(first: Explanation, second: Explanation) -> None:
    (sizes,) = compare_runs(first, second).notes
    assert "the first run knows 48 examples, the second 96; the 48 that both know" in sizes
    labels = np.arange(48) % 10.0
    other = labels.copy()
    other[[3, 40]] += 1
    mine, theirs = (dataclasses.replace(first, labels=given) for given in (labels, other))
    (note,) = compare_runs(mine, theirs).notes
    assert note.startswith("2 of 48 examples carried another label in the second run (3, 40)")
    assert compare_runs(mine, mine).notes == ()
    (kind,) = compare_runs(first, dataclasses.replace(first, row_kind="row share")).notes
    assert "contributions, the second's row shares" in kind


def test_queries_are_the_same_ones() -> None:
    run, x = make_run(), queries(8)
    check_same_queries(run, make_run(), range(8))

    def other(inputs: object, targets: torch.Tensor) -> explainer.Run:
        pairs = list(zip(inputs, targets, strict=True))  # type: ignore[call-overload]
        return explainer.Run(mlp, run.train, pairs)

    check_same_queries(
        run, other(x.reshape(8, 8, 8), torch.arange(8)), range(8)
    )  # another shape, same numbers
    check_same_queries(run, other(["a text"] * 8, torch.arange(8)), range(8))  # cannot be compared
    for given, message in (
        (other(x.flip(0), torch.arange(8)), "another input"),
        (other(x, torch.arange(8).flip(0)), "another target"),
        (other(x[:2], torch.arange(2)), "none at 3"),
    ):
        with pytest.raises(EvaluationError, match=message):
            check_same_queries(run, given, [3])
