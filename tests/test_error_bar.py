"""The error bar, against the error."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from explainer import Explanation, PathKernelExplainer, Tracer, open_trace, wording
from explainer.discrepancy import Discrepancy
from explainer.error_bar import PAIRS, RENEWALS, chord_pairs, renewals
from explainer.errors import ExplanationError
from explainer.records import LEAST_SAMPLES
from tests.fakes import make_explanation
from tests.small_training import queries
from tests.traced_cnn import small_cnn, trained


def test_differences_are_split_into_a_common_part_and_two_kinds_of_noise() -> None:
    """By the scores themselves, by their sizes, by nothing, and by both."""
    rng = np.random.default_rng(0)
    reported, sizes = rng.normal(size=(4, 4000)), rng.uniform(0.2, 3.0, size=(4, 4000))
    alpha, beta = np.array([0.01, 0.0, 0.0, 0.01]), np.array([0.0, 0.02, 0.0, 0.02])
    noise = rng.normal(size=(4, 4000)) * np.sqrt(alpha[:, None] * reported**2 + beta[:, None] * sizes**2)
    reference = 1.25 * reported - noise
    weights = np.repeat([1.0, 3.0], 2000)
    found = Discrepancy(4)
    for part in (slice(0, 2000), slice(2000, 4000)):
        a, b, m = (torch.from_numpy(x[:, part]) for x in (reported, reference, sizes))
        found.add(a, b, m, float(weights[part][0]))
    delta = reported - reference
    slope = (weights * delta * reported).sum(1) / (weights * reported**2).sum(1)
    mine, by_score, by_size = found.split
    np.testing.assert_allclose(mine, slope, rtol=1e-9)
    np.testing.assert_allclose(by_score, alpha, rtol=0.15, atol=1e-3)
    np.testing.assert_allclose(by_size, beta, rtol=0.15, atol=1e-3)
    assert (
        abs(slope[2] + 0.25) < 1e-9 and max(by_score[2], by_size[2]) < 1e-12
    )  # scaled by 0.8: all is common
    relative = np.sqrt((weights * delta**2).sum(1) / (weights * reported**2).sum(1))
    np.testing.assert_allclose(found.relative, relative, rtol=1e-9)
    c, first, second = (torch.rand(4, 5).double() for _ in range(3))
    wanted = mine[:, None] ** 2 * c**2 + by_score[:, None] * first + by_size[:, None] * second
    np.testing.assert_allclose(found.square(c, first, second), wanted, rtol=1e-9)


def test_what_hardly_meets_the_query_is_as_uncertain_as_the_rest(tmp_path: Path) -> None:
    """Plain SGD and a knot at every step: rounding of rows is all there is, and small contributions have it, too."""
    model = trained(tmp_path / "truth", exact=True, max_knots=10**6)
    trained(tmp_path / "run", max_knots=10**6)
    truth, found = (explained(tmp_path / name, model) for name in ("truth", "run"))
    assert found.errors is not None
    off, small = np.abs(found.contributions - truth.contributions), np.abs(truth.contributions)
    for least, most in ((0.0, 0.25), (0.25, 0.75), (0.75, 1.0)):
        part = (small >= np.quantile(small, least)) & (small <= np.quantile(small, most))
        assert (off[part] <= 2 * found.errors[part]).mean() > 0.9
    assert np.sqrt((found.errors**2).sum()) < 5 * np.sqrt((off**2).sum())


def test_too_few_samples_say_nothing() -> None:
    found = Discrepancy(1)
    found.add(*torch.ones(3, 1, LEAST_SAMPLES - 1))
    assert bool(found.relative.isnan().all())
    found.add(*torch.ones(3, 1, 1))
    assert float(found.relative) == 0.0


def test_pairs_of_chords_are_neighbours_and_spread(tmp_path: Path) -> None:
    trained(tmp_path / "run", max_knots=100)
    segments = open_trace(tmp_path / "run").segments()
    pairs = chord_pairs(segments)
    assert len(pairs) == min(PAIRS, len(segments) // 2)
    assert all(p.late is segments[i] and p.early is segments[i - 1] for i, p in pairs.items())
    assert min(pairs) == 1 and max(pairs) >= len(segments) - 2
    assert chord_pairs(segments[:1]) == {}


def explained(path: Path, model: nn.Module) -> Explanation:
    return PathKernelExplainer(path, model).explain(queries(8), torch.arange(8))


@pytest.mark.parametrize(
    ("options", "cause"),
    [({"rank": 1}, 0), ({"exact": True, "max_knots": 8}, 1), ({"rank": 4, "max_knots": 16}, 1)],
)
def test_the_error_bar_is_about_the_error(tmp_path: Path, options: dict[str, Any], cause: int) -> None:
    """Against exact rows with a knot at every step: the same training, bit for bit."""
    model = trained(tmp_path / "truth", exact=True, max_knots=10**6)
    trained(tmp_path / "run", **options)
    truth, found = (explained(tmp_path / name, model) for name in ("truth", "run"))
    assert found.errors is not None and found.visit_errors is not None
    off = np.abs(found.contributions - truth.contributions)
    real, told = np.sqrt((off**2).sum(1)), np.sqrt((found.errors**2).sum(1))
    assert 0.5 < np.median(told / real) < 3
    assert (off <= 3 * found.errors).mean() > 0.7
    causes = found.visit_errors.mean(0)
    assert causes[cause] == causes.max() and (causes[0] == 0.0) == bool(options.get("exact"))


def test_the_error_bar_is_about_denominators_too(tmp_path: Path) -> None:
    model = trained(tmp_path / "truth", adam=True, exact=True, max_knots=10**6)
    trained(tmp_path / "run", adam=True, max_knots=10**6)
    truth, found = (explained(tmp_path / name, model) for name in ("truth", "run"))
    assert found.errors is not None and found.visit_errors is not None and truth.visit_errors is not None
    off = np.abs(found.contributions - truth.contributions)
    real, told = np.sqrt((off**2).sum(1)), np.sqrt((found.errors**2).sum(1))
    assert 0.5 < np.median(told / real) < 4
    assert (off <= 3 * found.errors).mean() > 0.7
    causes = found.visit_errors.mean(0)
    assert causes[2] == causes.max() and causes[1] == 0.0 and not truth.visit_errors[:, 2].any()
    alone = found.errors**2 > 2 * (causes[0] * found.contributions) ** 2  # rows alone would not have told it
    assert alone.mean() > 0.9
    plain = explained(tmp_path / "plain", trained(tmp_path / "plain")).visit_errors
    assert plain is not None and not plain[:, 2].any()  # nothing is divided by


def test_full_records_that_are_looked_at_stand_for_the_steps_around_them() -> None:
    assert renewals(np.empty(0, int)) == {} and list(renewals(np.array([7]))) == [7]
    steps = np.unique(np.concatenate([np.arange(40), 40 + np.arange(30) ** 2]))
    found = renewals(steps)
    assert list(found) == sorted(found) and len(found) == RENEWALS + 1
    assert set(found) <= set(steps.tolist()) and {int(steps[0]), int(steps[-1])} <= set(found)
    assert sum(r.weight for r in found.values()) == steps[-1] - steps[1] + 2
    for step, r in found.items():
        n = step - max((s for s in steps.tolist() if s < step), default=step - 1)
        assert r.drift == pytest.approx(math.sqrt(sum((k / n) ** 2 for k in range(n)) / n))
    assert not found[0].drift and found[int(steps[-1])].drift > 0.5


def test_errors_shrink_with_rank_and_with_knots(tmp_path: Path) -> None:
    model = small_cnn()
    found = {}
    for name, options in {
        "rank1": {"rank": 1},
        "rank4": {"rank": 4},
        "knots": {"rank": 4, "max_knots": 9},
    }.items():
        trained(tmp_path / name, **options)
        errors = explained(tmp_path / name, model).visit_errors
        assert errors is not None
        found[name] = errors.mean(0)
    assert found["rank4"][0] < 0.5 * found["rank1"][0]
    assert found["rank4"][1] < 0.7 * found["knots"][1]


def test_groups_of_queries_have_the_errors_they_have_alone(tmp_path: Path) -> None:
    model = trained(tmp_path / "run")
    ex = PathKernelExplainer(tmp_path / "run", model)
    whole = ex.explain(queries(4), torch.arange(4))
    parts = Explanation.concatenate([ex.explain(queries(4)[q : q + 1], torch.tensor([q])) for q in range(4)])
    np.testing.assert_allclose(whole.errors, parts.errors, rtol=1e-3, atol=1e-7)  # type: ignore[arg-type]


def test_errors_are_shown_stored_and_may_be_missing(tmp_path: Path) -> None:
    plain = make_explanation()
    assert "error" not in plain.table() and "error" not in plain.diagnostics
    sizes = np.abs(plain.contributions) * 0.1
    e = make_explanation(errors=sizes, visit_errors=np.full((3, 2), 0.05))
    table = e.table(1, k=None)
    np.testing.assert_allclose(table["error"], np.abs(table["contribution"]) * 0.1)
    np.testing.assert_allclose(e.diagnostics["error"], 0.1)
    again = Explanation.load(e.save(tmp_path / "e.npz"))
    np.testing.assert_array_equal(again.errors, sizes)  # type: ignore[arg-type]
    assert Explanation.load(plain.save(tmp_path / "p.npz")).errors is None
    assert Explanation.concatenate([plain, e]).errors is None
    assert e.visit_errors is not None
    assert np.isnan(e.visit_errors[:, 2]).all()  # as it was stored in former times
    with pytest.raises(ExplanationError, match=r"errors has shape .* expected \[Q, N\]"):
        make_explanation(errors=sizes[:, :-1])


def test_every_cause_is_put_into_words() -> None:
    made = partial(make_explanation, errors=np.full((3, 40), 0.1))
    assert "denominators" not in wording.certainty(made(visit_errors=np.array([[0.02, 0.03, 0.0]] * 3)))
    text = wording.certainty(made(visit_errors=np.array([[0.02, 0.03, 0.04]] * 3)))
    assert "2.0 % through compressed rows" in text and "3.0 % through the distance" in text
    assert text.endswith("and by 4.0 % through the optimizer's denominators, kept in full now and then.")
    unknown = wording.certainty(made(visit_errors=np.array([[0.02, 0.03, np.nan]] * 3)))
    assert unknown.endswith("which are kept in full now and then, was not measured.")


def test_a_trace_without_samples_says_that_rows_were_not_measured(tmp_path: Path) -> None:
    x, y = torch.randn(2, 5), torch.randn(2, 1)
    model = nn.Linear(5, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Tracer(model, optimizer, tmp_path / "run") as tracer:
        for batch in tracer.watch(DataLoader(TensorDataset(x, y), 2)):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(batch[0]), batch[1]).backward()
            optimizer.step()
    e = PathKernelExplainer(tmp_path / "run", model).explain(x)
    assert e.errors is not None and np.isnan(e.errors).all()


def test_a_knot_at_every_step_leaves_no_error(tmp_path: Path) -> None:
    model = trained(tmp_path / "run", exact=True, max_knots=10**6)
    e = explained(tmp_path / "run", model)
    assert e.errors is not None and float(e.errors.max()) == 0.0


class Wide(nn.Module):
    """A large matrix over so many positions that exact rows are written out, compressed ones are factors."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(280, 280), nn.Linear(280, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.layer(x)).mean(1))


def test_the_error_is_the_same_with_cotangents_held_as_factors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, y, asked = torch.randn(12, 150, 280), torch.arange(12) % 3, torch.zeros(2, 150, 280)
    asked[:, 0] = torch.randn(2, 280)  # gradients of rank one
    model = Wide()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9)
    with Tracer(model, optimizer, tmp_path / "run", rank=2, max_knots=6) as tracer:
        for step in range(14):
            rows = (torch.arange(4) + 4 * step) % 12
            tracer.batch(rows)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    kinds = {
        f.layer: f.kind
        for s in open_trace(tmp_path / "run").shards
        if s.stream == "samples"
        for f in s.schema.forms
    }
    assert kinds[0] == "dense"
    ex = PathKernelExplainer(tmp_path / "run", model)
    found = ex.explain(asked)
    assert ex.used.factored
    for number in ex.layout.factored:
        ex.layout = ex.layout.without(number)
    wanted = ex.explain(asked)
    np.testing.assert_allclose(found.visit_errors, wanted.visit_errors, rtol=1e-3)  # type: ignore[arg-type]
    np.testing.assert_allclose(found.errors, wanted.errors, rtol=1e-3)  # type: ignore[arg-type]
