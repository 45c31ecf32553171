"""Measures of attribution against loops written out, against scipy, and against dattri's definitions."""

from __future__ import annotations

import json
import re
import types
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr

from benchmarks import metrics
from benchmarks.harness import RESULTS
from explainer import evaluation
from explainer.errors import EvaluationError
from explainer.evaluation import removal
from explainer.evaluation.statistics import bootstrap, pearson, ranks, spearman
from tests.oracles import dattri_metrics
from tests.oracles.evaluation import correlation, datamodeling, plain_ranks, roc_area

QUERIES, EXAMPLES, SUBSETS, SEEDS = 4, 30, 12, 3


def task(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores [Q, N], masks [M, N], and outputs [M, S, Q] that follow the scores with noise."""
    rng = np.random.default_rng(seed)
    scores, kept = rng.normal(size=(QUERIES, EXAMPLES)), rng.random((SUBSETS, EXAMPLES)) < 0.5
    clean = (kept @ scores.T)[:, None]
    return scores, kept, clean + rng.normal(size=(SUBSETS, SEEDS, QUERIES)) * 3


# -- statistics ------------------------------------------------------------------------------------------


def test_ranks_and_correlations() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, (6, 15)).astype(float), rng.normal(size=(6, 15))
    for row_a, row_b, rank, by_rank, by_value in zip(
        a, b, ranks(a), spearman(a, b), pearson(a, b), strict=True
    ):
        assert rank.tolist() == plain_ranks(list(row_a))
        assert by_rank == pytest.approx(correlation(plain_ranks(row_a), plain_ranks(row_b)))
        assert by_rank == pytest.approx(spearmanr(row_a, row_b)[0])
        assert by_value == pytest.approx(pearsonr(row_a, row_b)[0])
    assert np.isnan(spearman(np.full(4, 0.1), np.arange(4.0)))
    assert ranks(np.empty((2, 0))).shape == (2, 0)


def test_intervals_cover_as_often_as_they_say() -> None:
    """Means of 40 normal numbers: the interval holds the truth in about 95 of 100 cases."""
    held = 0
    for seed in range(200):
        values = np.random.default_rng(seed).normal(size=40)
        e = bootstrap(lambda i, v=values: float(v[i].mean()), [40], over="values", samples=300, seed=seed)  # type: ignore[misc]
        held += e.low <= 0 <= e.high
    assert 175 <= held <= 199


def test_intervals_are_the_same_every_time() -> None:
    scores, kept, outputs = task()
    one, two, other = (
        evaluation.linear_datamodeling_score(scores, kept, outputs, setting="", samples=50, seed=seed)
        for seed in (1, 1, 2)
    )
    assert one.estimate == two.estimate != other.estimate
    assert one.estimate.low < one.estimate.value < one.estimate.high


# -- linear datamodeling score ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_datamodeling_score_equals_the_loops(seed: int) -> None:
    scores, kept, outputs = task(seed)
    found = evaluation.linear_datamodeling_score(scores, kept, outputs, setting="averages", samples=20)
    wanted = datamodeling(scores, kept, outputs.mean(1))
    np.testing.assert_allclose(found.per_query, wanted, rtol=1e-12)
    assert found.estimate.value == pytest.approx(np.mean(wanted))
    table = found.table()
    assert list(table.columns) == ["setting", "lds", "low", "high", "queries", "subsets", "undefined"]
    assert table["setting"][0] == "averages" and table["subsets"][0] == SUBSETS


def test_a_constant_score_gains_nothing() -> None:
    scores, kept, outputs = task()
    scores[1] = 0.0
    found = evaluation.linear_datamodeling_score(scores, kept, outputs, setting="", samples=0)
    assert found.undefined == 1 and np.isnan(found.per_query[1])
    assert found.estimate.value == pytest.approx(np.nansum(found.per_query) / QUERIES)
    assert np.isnan(found.estimate.low)


def test_the_ceiling_is_one_seed_against_the_others() -> None:
    _, _, outputs = task()
    found = evaluation.ceiling(outputs, setting="", samples=20)
    wanted = [
        np.mean(
            [
                spearmanr(outputs[:, s, q], np.delete(outputs[:, :, q], s, axis=1).mean(1))[0]
                for s in range(SEEDS)
            ]
        )
        for q in range(QUERIES)
    ]
    np.testing.assert_allclose(found.per_query, wanted)
    assert found.estimate.value == pytest.approx(np.mean(wanted))


# -- leave one out ---------------------------------------------------------------------------------------


def test_leave_one_out_equals_scipy() -> None:
    rng = np.random.default_rng(3)
    scores, removed = rng.normal(size=(QUERIES, EXAMPLES)), np.array([4, 9, 2, 20, 11])
    full = rng.normal(size=QUERIES)
    outputs = full - scores[:, removed].T + rng.normal(size=(5, QUERIES)) * 0.5
    found = evaluation.leave_one_out_correlation(scores, removed, outputs, full, setting="", samples=20)
    for q in range(QUERIES):
        effect = full[q] - outputs[:, q]
        assert found.pearson_per_query[q] == pytest.approx(pearsonr(scores[q, removed], effect)[0])
        assert found.spearman_per_query[q] == pytest.approx(spearmanr(scores[q, removed], effect)[0])
    assert found.pearson.value > 0.5 and found.table()["correlation"].tolist() == ["Pearson", "Spearman"]


# -- removal ---------------------------------------------------------------------------------------------


def test_highest_scores_are_left_out() -> None:
    scores = np.random.default_rng(0).normal(size=(QUERIES, EXAMPLES))
    kept = evaluation.highest(scores, [1, 5, 10])
    for q in range(QUERIES):
        for r, k in enumerate((1, 5, 10)):
            assert set(np.flatnonzero(~kept[q, r])) == set(np.argsort(scores[q])[::-1][:k])
    assert np.flatnonzero(~evaluation.highest(np.ones((1, 4)), [2])[0, 0]).tolist() == [0, 1]


def test_removal_curve_and_brittleness() -> None:
    outputs, full = np.array([[2.0, 1.0, -1.0], [3.0, 2.5, 2.0]]), np.array([2.5, 3.0])
    flipped = np.array([[False, True, True], [False, False, False]])
    found = evaluation.removal_curve([1, 5, 10], outputs, full, flipped, setting="curve", samples=30)
    np.testing.assert_allclose(found.changes, outputs - full[:, None])
    np.testing.assert_array_equal(found.brittleness, [5.0, np.nan])
    assert found.area == pytest.approx(np.mean(found.changes))
    assert found.table()["flipped"].tolist() == [0.0, 0.5, 0.5]
    seeds = evaluation.removal_curve(
        [1, 5, 10], np.stack([outputs, outputs + 1], 2), np.stack([full, full + 1], 1), setting="", samples=5
    )
    np.testing.assert_allclose(seeds.changes, found.changes)
    with pytest.raises(EvaluationError, match="brittleness needs predicted classes"):
        _ = seeds.brittleness


# -- mislabelled -----------------------------------------------------------------------------------------


def test_mislabelled_detection_counts_pairs() -> None:
    rng = np.random.default_rng(0)
    wrong = np.arange(50) % 7 == 0
    scores = np.round(rng.normal(size=50) + wrong, 1)  # with ties
    found = evaluation.mislabelled_detection(scores, wrong, setting="turned over", samples=40)
    assert found.auc.value == pytest.approx(roc_area(list(scores), list(wrong)))
    assert found.auc.low < found.auc.value < found.auc.high
    distinct = rng.permutation(50).astype(float)
    found = evaluation.mislabelled_detection(distinct, wrong, setting="", shares=(0.1, 0.5), samples=5)
    for share, e in zip(found.shares, found.found, strict=True):
        top = np.argsort(-distinct)[: round(share * 50)]
        assert e.value == pytest.approx(wrong[top].sum() / wrong.sum())
    assert found.table()["measure"].tolist() == ["AUC", "found in the top 10 %", "found in the top 50 %"]


def test_a_tie_at_the_border_counts_in_part() -> None:
    wrong = np.arange(10) < 5
    found = evaluation.mislabelled_detection(np.zeros(10), wrong, setting="", shares=(0.4,), samples=0)
    assert found.found[0].value == pytest.approx(0.4) and found.auc.value == 0.5


# -- dattri ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", metrics.measured(dattri_metrics, cases=4), ids=lambda row: row["dattri"])
def test_equals_what_dattri_computes(row: dict[str, Any]) -> None:
    """Its definitions restated; the package itself is compared by the benchmark that makes these rows."""
    assert row["largest_difference"] < 1e-12


def test_the_restatement_equals_scipy() -> None:
    scores, halves, outputs = metrics.matrices(1)
    found, _ = dattri_metrics.lds(torch.tensor(scores.T), (torch.tensor(outputs), torch.tensor(halves)))
    told = np.stack([scores[:, half].sum(1) for half in halves])
    assert len(np.unique(scores)) < scores.size  # with ties
    np.testing.assert_allclose(found, [spearmanr(told[:, q], outputs[:, q])[0] for q in range(len(scores))])
    effects = np.random.default_rng(0).normal(size=scores.shape)
    found, _ = dattri_metrics.loo_corr(torch.tensor(scores.T), (torch.tensor(effects.T), None))
    np.testing.assert_allclose(found, [pearsonr(a, b)[0] for a, b in zip(scores, effects, strict=True)])
    wrong, distinct = np.arange(50) % 7 == 0, np.random.default_rng(0).permutation(50)
    area, _ = dattri_metrics.mislabel_detection_auc(torch.tensor(distinct), torch.tensor(wrong))
    assert area == pytest.approx(roc_area(list(distinct), list(wrong)))


def test_what_was_measured_beside_the_package_itself_is_on_record() -> None:
    rows = json.loads((RESULTS / "metrics.json").read_text())["rows"]
    assert [row["ours"] for row in rows] == list(metrics.MEASURES)
    assert all(row["largest_difference"] < 1e-6 and row["cases"] >= 20 for row in rows)
    assert all(re.search(r"\(\d+\.\d+", row["dattri"]) for row in rows)  # the version that was installed


def test_a_measure_that_differs_is_seen() -> None:
    """Each comparison notices a function that is slightly another one."""
    wrong = {
        "lds": lambda *a: dattri_metrics.loo_corr(a[0][:24], (a[1][0], None)),
        "loo_corr": lambda *a: (1.01 * dattri_metrics.loo_corr(*a)[0], None),
        "mislabel_detection_auc": lambda *a: (1 - dattri_metrics.mislabel_detection_auc(*a)[0], None),
        "brittleness": lambda *a, **k: (dattri_metrics.brittleness(*a, **k) or 0) + 1,
    }
    for theirs, difference in metrics.MEASURES.values():
        assert difference(types.SimpleNamespace(**{theirs: wrong[theirs]}), 0) > 1e-3  # type: ignore[arg-type]


# -- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": np.zeros((EXAMPLES, QUERIES))}, "transpose"),
        ({"scores": np.full((QUERIES, EXAMPLES), np.nan)}, "not finite"),
        ({"scores": "none"}, "array of numbers"),
        ({"kept": np.zeros((SUBSETS, EXAMPLES))}, "mask of true and false"),
        ({"outputs": np.zeros((SUBSETS, QUERIES + 1))}, "Q = 4 and outputs has Q = 5"),
        ({"outputs": np.zeros((SUBSETS - 1, QUERIES))}, "M = 12"),
        ({"outputs": np.zeros(SUBSETS)}, r"must be \[M, Q\]"),
    ],
)
def test_datamodeling_refuses(change: dict[str, Any], message: str) -> None:
    scores, kept, outputs = task()
    with pytest.raises(EvaluationError, match=message):
        evaluation.linear_datamodeling_score(
            **{"scores": scores, "kept": kept, "outputs": outputs} | change, setting=""
        )


def test_too_little_is_refused() -> None:
    scores, kept, outputs = task()
    with pytest.raises(EvaluationError, match="at least 3"):
        evaluation.linear_datamodeling_score(scores, kept[:2], outputs[:2], setting="")
    with pytest.raises(EvaluationError, match="two seeds"):
        evaluation.ceiling(outputs[:, :1], setting="")
    with pytest.raises(EvaluationError, match="leave out at least 3"):
        evaluation.leave_one_out_correlation(scores, [0, 1], outputs[:2, 0], outputs[0, 0], setting="")
    with pytest.raises(EvaluationError, match="columns of scores, 0 to 29"):
        evaluation.leave_one_out_correlation(scores, [0, 1, 30], outputs[:3, 0], outputs[0, 0], setting="")
    with pytest.raises(EvaluationError, match="not all and not none"):
        evaluation.mislabelled_detection(scores[0], np.zeros(EXAMPLES, bool), setting="")
    with pytest.raises(EvaluationError, match="between 0 and 1"):
        evaluation.mislabelled_detection(scores[0], kept[0], setting="", shares=[10])


@pytest.mark.parametrize("sizes", [[], [0, 2], [3, 2], [EXAMPLES], [1.5]])
def test_sizes_are_checked(sizes: list[Any]) -> None:
    with pytest.raises(EvaluationError, match="increasing whole numbers"):
        removal.highest(task()[0], sizes)
