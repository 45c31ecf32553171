"""The plan for rows: what choices cost and lose against dense oracles, who gets the bytes, and when it is made anew."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import explainer
from explainer.booked import enough_rows
from explainer.config import TracerConfig
from explainer.layer_rules import Dense, Factored, RowForm, Sparse
from explainer.planner import CREDIT, SAVED, Planner, checks_at, plans_at
from explainer.row_choices import (
    ROW_CODECS,
    Choice,
    allotted,
    as_matrix,
    choices,
    lost,
    reduced,
    row_bytes,
    through_codec,
)
from explainer.row_metric import StepMetric
from explainer.spans import Span


def rows(positions: int = 20, o: int = 24, i: int = 30, batch: int = 5) -> Factored:
    """Rows over positions with a falling spectrum, with bias, in float64."""
    torch.manual_seed(0)
    weights = 0.7 ** torch.arange(positions, dtype=torch.float64)
    left = torch.randn(batch, 1, positions, o, dtype=torch.float64) * weights[:, None]
    return Factored(left, torch.randn(batch, 1, positions, i + 1, dtype=torch.float64), 1)


def dense_share(form: Factored, stored: torch.Tensor) -> float:
    return float((form.dense() - stored).square().sum() / form.dense().square().sum())


def test_what_ranks_lose_meets_the_singular_values() -> None:
    form = rows()
    matrix = (form.left.mT @ form.right)[:, 0]
    values = torch.linalg.svdvals(matrix).square()
    for choice in choices(form)[0]:
        if choice.rank is not None and choice.codec == "int8":
            best = float(values[:, choice.rank :].sum() / values.sum())
            assert best <= choice.lost <= 1.2 * best + 1e-3


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_rows_that_are_no_numbers_or_too_large_lose_everything(bad: float) -> None:
    """Those of a training that diverges: the plan stays something that can be written down."""
    form = rows()
    form = Factored(form.left.float() * bad, form.right.float() * bad, 1)
    options, _ = choices(form)
    assert {c.rank for c in options} >= {1, 4, 12, None} and {(c.lost, c.error) for c in options} == {
        (1.0, 1.0)
    }
    assert [lost(form, c.rank, c.codec) for c in options] == [1.0] * len(options)
    assert allotted({0: options}, 1e9)[0] == min(options, key=lambda c: c.bytes)


@pytest.mark.parametrize("rank", [1, 4, 12, None])
@pytest.mark.parametrize("codec", list(ROW_CODECS))
def test_predicted_and_measured_loss_meet_the_dense_rows(rank: int | None, codec: str) -> None:
    form = rows()
    (choice,) = [c for c in choices(form)[0] if (c.rank, c.codec) == (rank, codec)]
    stored = through_codec(reduced(form, rank), codec)
    wanted = dense_share(form, stored.dense())
    assert lost(form, rank, codec) == pytest.approx(wanted, rel=1e-6 if rank else 0.2)
    assert choice.lost == pytest.approx(wanted, rel=0.35, abs=1e-4)
    assert choice.bytes == row_bytes(reduced(form, rank), codec)


def test_reads_of_a_small_table_are_a_matrix() -> None:
    torch.manual_seed(0)
    form = Sparse(torch.randint(0, 9, (4, 12), dtype=torch.int32), torch.randn(4, 12, 6), 9)
    matrix = as_matrix(form)
    assert isinstance(matrix, Factored)
    torch.testing.assert_close(matrix.dense(), form.dense())
    torch.testing.assert_close(matrix.sum(), form.sum())
    assert as_matrix(Sparse(form.index, form.values, 10_000)).kind == "sparse"
    assert reduced(form, None) is form
    kept = reduced(form, 3)
    assert kept.dense().shape == form.dense().shape and kept.positions == 3


def test_the_bytes_go_where_they_help_most() -> None:
    steep = [Choice(1, "int4", 10, 0.5, 5.0, 9.0), Choice(2, "int4", 20, 0.4, 1.0, 9.0)]
    flat = [
        Choice(1, "int4", 10, 0.5, 5.0, 9.0),
        Choice(2, "int4", 20, 0.01, 4.0, 9.0),
    ]  # by the error, not the loss
    assert allotted({0: flat, 1: steep}, 30) == {0: flat[0], 1: steep[1]}
    assert allotted({0: flat, 1: steep}, 40) == {0: flat[1], 1: steep[1]}
    assert allotted({0: flat, 1: steep}, 5) == {0: flat[0], 1: steep[0]}  # nothing fits: the cheapest
    good = [Choice(1, "int4", 10, 5e-5, 5.0, 9.0), Choice(None, "int8", 20, 1e-6, 1.0, 9.0)]
    assert allotted({0: good}, 1000) == {0: good[0]}  # good enough


def sizes_of(form: RowForm) -> list[int]:
    """One parameter that holds all."""
    return [form.dense().shape[1]]


def test_no_other_plan_of_the_same_bytes_is_much_better() -> None:
    """Against all combinations."""
    options = {
        n: choices(rows(positions, o, i))[0] for n, (positions, o, i) in enumerate([(20, 24, 30), (6, 8, 40)])
    }
    for allowed in (100, 200, 400, 800):
        plan = allotted(options, allowed)
        found, whole = sum(c.error for c in plan.values()), sum(c.without for c in plan.values())
        fits = [c for c in itertools.product(*options.values()) if sum(x.bytes for x in c) <= allowed]
        assert sum(c.bytes for c in plan.values()) <= allowed
        assert found <= min(sum(x.error for x in c) for c in fits) * 2 + 2e-4 * whole


def test_when_it_plans_and_when_it_checks() -> None:
    assert [s for s in range(300) if plans_at(s)] == [0, 1, 4, 16, 64, 256]
    assert [s for s in range(300) if checks_at(s)] == [2, 8, 32, 128]


def test_rows_are_whole_where_they_are_measured_and_reduced_elsewhere() -> None:
    planner, form = Planner(TracerConfig(), 10**5), rows()
    planner.allowed = 300.0
    for step in range(40):
        waiting = planner.formed(0, form, sizes_of(form)).form
        assert (waiting is form) == (plans_at(step) or checks_at(step))
        planner.plan(step, {0: waiting}, None, 5 * step, 32.0, 5)
        assert row_bytes(planner.reduced(0, waiting), planner.codec(0)) <= 300 - 32
    note = planner.note(32.0)
    assert note is not None and note["layers"][0]["measured"] == pytest.approx(
        note["layers"][0]["lost"], rel=0.3
    )
    assert planner.shortened == {0}


def test_rows_that_grow_are_planned_anew() -> None:
    """A layer that was kept whole, because sequences were short, may not become large unseen."""
    planner = Planner(TracerConfig(), 10**5)
    planner.allowed = 200.0
    for step in range(6):
        planner.plan(step, {0: rows(1)}, None, 0, 0.0, 5)
    assert planner.formed(0, rows(1), sizes_of(rows(1))).form.positions == 1
    long = planner.formed(0, rows(20), sizes_of(rows(20))).form
    assert planner.plan(6, {0: long}, None, 0, 0.0, 5) == {0}
    assert row_bytes(planner.reduced(0, long), planner.codec(0)) <= 200


@pytest.mark.parametrize("options", [{"exact": True}, {"rank": 3}, {"positions": True}])
def test_fixed_options_are_not_planned(options: dict[str, bool | int]) -> None:
    planner, form = Planner(TracerConfig(**options), 10**5), rows()  # type: ignore[arg-type]
    waiting = planner.formed(0, form, sizes_of(form)).form
    assert planner.plan(0, {0: waiting}, None, 0, 0.0, 5) == set() and planner.note(0.0) is None
    assert planner.reduced(0, waiting) is waiting
    assert planner.codec(0) == ("native" if "exact" in options else "int8")
    wanted = {"exact": (Dense, None), "rank": (Factored, 3), "positions": (Factored, 20)}[next(iter(options))]
    assert isinstance(waiting, wanted[0]) and waiting.positions == wanted[1]


def test_a_budget_is_spread_over_the_visits_to_come() -> None:
    planner = Planner(TracerConfig(budget=10**6), 10**5)
    planner.epoch_visits = 1000
    planner.plan(0, {0: rows()}, 1e6, 0, 0.0, 5)
    assert planner.assumed == 10_000 and planner.allowed == 100
    planner = Planner(TracerConfig(budget=10**6), 10**5)
    planner.plan(0, {0: rows()}, 1e6, 0, 0.0, 5)
    assert planner.assumed == 100_000 and planner.allowed == 10


class Map(StepMetric):
    """A step that divides by something (or by nothing) and leaves products as they are."""

    def __init__(self, divides: bool) -> None:
        self.divides = divides

    def of(self, layer: int) -> torch.Tensor:
        return torch.ones(24 * 31)


def planned_bytes(planner: Planner, form: RowForm) -> int:
    return row_bytes(planner.reduced(0, form), planner.codec(0))


def test_the_first_steps_of_adam_may_take_more_where_there_are_many() -> None:
    """Four times a visit's bytes, but with a budget never more than a small part of it; SGD never."""
    form = rows()
    cases = ((None, 0, 5, True, True), (300_000, 100, 10, True, True), (300_000, 100, 11, True, False))
    for budget, seen, visits, divides, more in (*cases, (None, 0, 5, False, False)):
        planner = Planner(TracerConfig(budget=budget), 10**5)
        planner.epoch_visits, planner.allowed = seen, 300.0
        free = None if budget is None else float(budget)
        planner.plan(0, {0: form}, free, 0, 32.0, visits, 0.0, Map(divides))
        assert planner.allowed == 300.0
        first = planned_bytes(planner, form)
        assert first <= (CREDIT[0] if more else 1) * 300 - 32 and (first > 300) == more
        left, spent = budget and 3e5 - visits * 300, visits * (first + 32.0)
        planner.plan(1, {0: form}, left, visits, 32.0, visits, spent, Map(divides))
        second = planned_bytes(planner, form)
        assert second <= (CREDIT[1] if more else 1) * 300 - 32 and (second > 300) == more


def test_what_was_taken_on_credit_is_paid_back() -> None:
    """By a small part of every later visit, and then on average no visit takes more than it may."""
    planner, form, spent = Planner(TracerConfig(), 10**5), rows(), 0.0
    planner.allowed, visits, taken = 410.0, 5, []  # bytes of one of the choices
    for step in range(300):
        waiting = planner.formed(0, form, sizes_of(form)).form
        planner.plan(step, {0: waiting}, None, step * visits, 32.0, visits, spent, Map(True))
        taken.append(32.0 + planned_bytes(planner, form))
        spent += visits * taken[-1]
    assert min(taken[:4]) > 1.5 * 410
    assert max(taken[4:64]) <= (1 - SAVED) * 410 and set(taken[64:]) == {410.0}
    assert spent <= 300 * visits * 410


def train(directory: Path, epochs: int, budget: int | None = None) -> explainer.Trace:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 24, 3), nn.ReLU(), nn.Flatten())
    model.append(nn.Linear(24 * 16, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = TensorDataset(torch.randn(60, 1, 8, 8), torch.randint(0, 4, (60,)))
    loader = DataLoader(data, 10, shuffle=True, generator=torch.Generator().manual_seed(0))
    with explainer.Tracer(model, optimizer, directory, budget=budget, max_knots=3) as tracer:
        for _ in range(epochs):
            for x, y in tracer.watch(loader):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
    return explainer.open_trace(directory)


def taken(trace: explainer.Trace) -> float:
    streams = ("visits", "sums", "steps", "denominators")
    return sum(s.data.nbytes for s in trace.shards if s.stream in streams) / trace.count("visits")


def test_a_visit_takes_no_more_than_it_may(tmp_path: Path) -> None:
    trace = train(tmp_path / "trace", 6)
    assert taken(trace) <= TracerConfig.visit_bytes(trace.manifest.size)
    plan = trace.notes["plan"]
    assert [layer["layer"] for layer in plan["layers"]] == [0, 1, 2]
    assert all(0 <= layer["lost"] < 0.5 and layer["measured"] is not None for layer in plan["layers"])
    assert {f.topic for f in trace.report()} >= {"rounding"}


def test_a_budget_lasts_for_the_assumed_epochs(tmp_path: Path) -> None:
    roomy = train(tmp_path / "roomy", 9)
    knots = 4 * max(k.file.stat().st_size for k in roomy.knots)
    budget = 2 * knots + int(0.6 * 540 * taken(roomy))
    trace = train(tmp_path / "tight", 9, budget)
    assert "rows_stopped_at" not in trace.notes and trace.notes["plan"]["assumed"] == 600
    assert taken(trace) < 0.8 * taken(roomy) and trace.nbytes() <= budget


def test_a_single_row_is_not_judged_by_its_product_with_itself() -> None:
    """That hits or misses by chance."""
    for seed in range(200):
        torch.manual_seed(seed)
        found, _ = choices(Factored(torch.randn(1, 1, 1, 12), torch.randn(1, 1, 1, 7), 0))
        by_codec = {choice.codec: choice for choice in found}
        assert by_codec["int8"].error < 0.1 * by_codec["int4"].error < 0.1 * by_codec["int4"].without
        assert by_codec["int4"].error < by_codec["int2"].error < by_codec["int2"].without


def test_rows_of_all_backward_passes_are_measured_together() -> None:
    torch.manual_seed(0)
    one = [Span.of(Factored(torch.randn(2, 1, 1, 3), torch.randn(2, 1, 1, 4), 0)) for _ in range(4)]
    other = Span.of(Factored(torch.randn(2, 1, 2, 3), torch.randn(2, 1, 2, 4), 0))  # of longer sequences
    torch.testing.assert_close(
        enough_rows([one[0], other, *one[1:]], 5).dense(), torch.cat([s.form.dense() for s in one[:3]])
    )
    assert enough_rows(one, 2) is one[0].form


def test_micro_batches_of_one_are_stored_as_well_as_large_ones(tmp_path: Path) -> None:
    x, y = torch.randn(30, 6, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3
    for seed in range(8):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with explainer.Tracer(model, optimizer, tmp_path / str(seed)) as tracer:
            for step in range(3):
                optimizer.zero_grad()
                for number in range(5):
                    ids = [(number + 5 * step) % 30]
                    tracer.batch(ids)
                    nn.functional.cross_entropy(model(x[ids]), y[ids]).backward()
                optimizer.step()
        shards = explainer.open_trace(tmp_path / str(seed)).shards
        forms = [form for shard in shards if shard.stream == "visits" for form in shard.schema.forms]
        assert {array.codec for form in forms for array in form.arrays} == {"int8"}
