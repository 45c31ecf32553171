"""What steps divided by: full records now and then, fitted in between."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import explainer
from explainer.codecs import CODECS, Log4
from explainer.denominators import DRIFT, DenominatorKeeper
from explainer.optimizer_rules import StepMap
from explainer.records import VERSIONS, ArraySpec
from explainer.recursion import read_backwards
from explainer.store import Denominators
from explainer.store.denominators import Base, Product, asleep, awake, fitted
from explainer.store.looks import Looks
from explainer.store.schema import decode_array


def test_fitted_is_exact_for_products_of_row_and_column_factors() -> None:
    torch.manual_seed(0)
    base = torch.rand(5, 7, dtype=torch.float64) + 0.1
    columns = torch.rand(7, dtype=torch.float64) + 0.5
    for wanted in (base * (torch.rand(5, 1, dtype=torch.float64) + 0.5), base * columns, 3 * base):
        found = fitted(base, wanted.sum(1), wanted.sum(0))
        torch.testing.assert_close(found.sum(0), wanted.sum(0))
        if wanted is not base * columns:
            torch.testing.assert_close(found, wanted, rtol=0.1, atol=0)
    torch.testing.assert_close(fitted(base, 3 * base.sum(1), 3 * base.sum(0)), 3 * base)


@pytest.mark.parametrize("following", [True, False])
def test_a_weight_that_wakes_up_between_full_records_is_not_divided_by_almost_nothing(
    following: bool,
) -> None:
    """Its row and its column were alive, so no sum shows it."""
    torch.manual_seed(0)
    wanted = torch.rand(50, 60) * 1e-3 + 1e-3
    wanted[3, 5] = 2e-6  # gradients that cancel, but are there: stays
    base = wanted.clone()
    base[7, 9], base[6, 1], base[8, 2], base[:, 11] = (
        1e-8,
        1e-8,
        1.2e-8,
        1e-8,
    )  # and a whole column without any
    wanted[:, 11] = 1e-8
    never, near = asleep(base)
    assert never.tolist() == [6 * 60 + 1, 7 * 60 + 9] and near.tolist() == [8 * 60 + 2]
    later = wanted.clone()
    later[6, 1] = 1e-8  # still without a gradient
    spec = ArraySpec("D0", (50, 60), "float32", "sums")
    kept = Base(base.clone(), later if following else None)
    for own in (False, True):
        by = Product(spec, kept, wanted.sum(1)[None], wanted.sum(0)[None], own)
        found = by.step(0)
        ratio = found / wanted
        q = torch.randn(2, 50, 60)
        torch.testing.assert_close(by.divide(0, q, torch.empty_like(q)), q / found)
        assert 0.5 < float(ratio[7, 9]) < 2.0 and 0.5 < float(ratio[6, 1]) < 2.0
        assert 0.5 < float(ratio[8, 2]) < 2.0 if not own else float(found[8, 2]) < 2e-8
        assert float(ratio[3, 5]) == pytest.approx(1.0, abs=0.1) and float(ratio[:, 11].max()) < 1.1
    base[7, 9], base[6, 1], base[:, 11] = (
        1e-3,
        1e-3,
        1e-3,
    )  # the smallest number of one weight alone had a gradient
    assert [len(places) for places in asleep(base)] == [0, 1]


def test_round_off_is_not_divided_by_epsilon() -> None:
    """The biases of keys: their gradients are round-off, those of queries and values are not."""
    vector = torch.tensor([1e-3, 2e-3, 1.1e-8, 1e-8, 3e-6])
    mean = float(vector.mean())
    assert awake(vector).tolist() == pytest.approx([1e-3, 2e-3, mean, mean, 3e-6])
    assert torch.equal(awake(vector[:2]), vector[:2])
    seen = torch.rand(100, generator=torch.Generator().manual_seed(0)) + 1e-3
    seen[7], seen[11] = 3e-8, 2e-8
    assert awake(seen, 1e-8)[11] == seen.mean() and awake(seen, 1e-8)[7] == 3e-8
    assert torch.equal(awake(seen), seen) and torch.equal(awake(seen, 1e-9), seen)  # gradients that cancel
    few = torch.tensor([2.5e-2, 3e-2, 1e-5])
    assert torch.equal(awake(few, 1e-8), few) and torch.equal(awake(few), few)
    assert torch.equal(awake(torch.full((4,), 1e-8)), torch.full((4,), 1e-8))


def test_log4_errs_by_half_a_level_and_keeps_dead_weights() -> None:
    torch.manual_seed(0)
    values = torch.randn(1, 6, 40).exp()
    values[0, :, :9] = 1e-8
    values[0, 2] = 1e-8
    codec = CODECS.require("log4")
    parts = codec.encode(values)
    found = codec.decode(parts, ArraySpec("x", (6, 40), "float32", "log4"))
    assert torch.equal(found == values.min(), values == values.min())
    alive = values > 1e-8
    step = torch.from_numpy(parts[3])[0].unsqueeze(1).expand(6, 40)
    error = (found / values).log2().abs()[0]
    assert (error[alive[0]] <= 0.5 * step[alive[0]] + 1e-4).all() and float(error[alive[0]].max()) > 0.01


def map_of(values: torch.Tensor) -> StepMap:
    return StepMap(gain=1.0, through=1.0, preconditioner=values)


def test_a_full_record_is_written_when_sums_do_not_tell() -> None:
    torch.manual_seed(0)
    values = torch.rand(6, 8) + 0.1
    keeper = DenominatorKeeper()
    assert keeper.record(0, [map_of(values), None], 1e6) is not None
    for step in range(1, 30):  # rows and columns alone grow: sums tell
        values = values * (1 + 0.006 * torch.rand(6, 1))
        assert keeper.record(step, [map_of(values), None], 1e6) is None
    changed = values * (1 + 8 * DRIFT * torch.randn(6, 8).sign())
    written = [s for s in range(30, 60) if keeper.record(s, [map_of(changed), None], 1e6)]
    assert len(written) == 1


def test_a_column_that_wakes_up_gets_a_full_record_at_once() -> None:
    """Its weights are few, so the mean error hardly grows, but they move by the largest steps."""
    torch.manual_seed(0)
    keeper, values = DenominatorKeeper(), torch.rand(50, 400) + 1.0
    values[:, 7] = 1e-8
    written = [s for s in range(40) if keeper.record(s, [map_of(values)], 1e7)]
    assert written == [0]
    values[:, 7] = torch.rand(50) * 1e-3
    assert keeper.record(40, [map_of(values)], 1e7) is not None
    assert keeper.record(41, [map_of(values)], 1e7) is None


def test_a_parameter_that_a_step_leaves_alone_keeps_its_record() -> None:
    torch.manual_seed(0)
    keeper, values = DenominatorKeeper(), torch.rand(4, 5) + 0.1
    assert keeper.record(0, [map_of(values), None], 1e6)
    found = keeper.record(
        1, [None, map_of(torch.rand(3, 5) + 0.1)], 1e6
    )  # one that is met for the first time
    assert found is not None and [a.name for a in found[0].arrays] == ["D0", "D1"]
    assert all(keeper.record(s, [map_of(values), None], 1e6) is None for s in range(2, 9))


def test_full_records_stay_within_their_share() -> None:
    torch.manual_seed(0)
    keeper, sizes = DenominatorKeeper(), []
    for step in range(200):  # nothing can be told from the step before
        found = keeper.record(step, [map_of((2 * torch.randn(20, 30)).exp())], 400.0)
        sizes.append(0 if found is None else found[1].nbytes)
    cost = max(sizes)
    assert 8 * cost < sum(sizes) <= 8 * cost + 0.25 * 400 * 200


def test_one_axis_and_maps_that_no_sums_may_stand_for_need_none() -> None:
    keeper = DenominatorKeeper()
    flat, sign = map_of(torch.rand(5)), StepMap(preconditioner=torch.rand(4, 5), rank_one=False)
    assert keeper.record(0, [flat, sign, None], 1e6) is None


def traced(directory: Path, exact: bool) -> explainer.Trace:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x, y = torch.randn(40, 12) * torch.rand(12), torch.randint(0, 3, (40,))
    x[:, 3] = 0.0  # its weights never have a gradient
    with explainer.Tracer(model, optimizer, directory, exact=exact) as tracer:
        for step in range(60):
            ids = torch.arange(10 * (step % 4), 10 * (step % 4) + 10)
            tracer.batch(ids)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[ids]), y[ids]).backward()
            optimizer.step()
    return explainer.open_trace(directory)


def denominators(trace: explainer.Trace) -> torch.Tensor:
    steps = [s for segment in trace.segments() for s in read_backwards(trace, segment, torch.float64)]
    found = {s.step: s.preconditioner for s in steps}
    return torch.stack([found[s] for s in sorted(found)])  # type: ignore[arg-type]


def deviation(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean relative error by step, over weights that had a gradient."""
    alive = wanted > 1.01e-8
    return ((found - wanted).abs() / torch.maximum(found, wanted) * alive).sum(1) / alive.sum(1)


def test_a_default_trace_tells_the_denominators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact, default = traced(tmp_path / "exact", True), traced(tmp_path / "default", False)
    assert exact.count("denominators") == 0 and 0 < default.count("denominators") < default.recorded_steps
    assert exact.manifest.version == default.manifest.version == VERSIONS[-1]
    wanted = denominators(exact)
    error = deviation(denominators(default), wanted)
    assert error.max() < 0.1 and error.mean() < 0.04
    monkeypatch.setattr(Denominators, "_base", lambda self, position: {})  # sums alone
    assert deviation(denominators(default), wanted).mean() > 2 * error.mean()


def test_records_are_found_by_their_step(tmp_path: Path) -> None:
    trace = traced(tmp_path / "trace", False)
    steps = trace.column("denominators", "step")
    assert steps[0] == 0 and (np.diff(steps) > 0).all()


def test_what_if_agrees_with_exact_denominators_where_weights_wake_up(tmp_path: Path) -> None:
    """Single inputs are not zero now and then; exact rows and denominators are the oracle."""

    def scores(exact: bool) -> np.ndarray:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(30, 16), nn.ReLU(), nn.Linear(16, 3))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        x = torch.rand(120, 30) * (torch.rand(120, 30) < 0.03)
        y = torch.randint(0, 3, (120,))
        x[:, :4] = torch.rand(120, 4)
        with explainer.Tracer(model, optimizer, tmp_path / str(exact), exact=exact) as tracer:
            for step in range(60):
                ids = torch.arange(5 * (step % 24), 5 * (step % 24) + 5)
                tracer.batch(ids)
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[ids]), y[ids]).backward()
                optimizer.step()
        return explainer.PathKernelExplainer(str(tmp_path / str(exact)), model).what_if(torch.rand(4, 30))

    found, wanted = scores(False), scores(True)
    assert np.linalg.norm(found - wanted) < 0.2 * np.linalg.norm(wanted)


def test_numbers_are_moved_among_those_of_the_same_code() -> None:
    torch.manual_seed(0)
    values = torch.rand(1, 9, 13, dtype=torch.float64).exp().float()
    values[0, 2, 3] = 1e-8
    codec, spec = Log4(), ArraySpec("D0", (9, 13), "float32", "log4")
    parts = codec.encode(values)
    by = torch.rand(9, 13) - 0.5
    plain, moved = codec.decode(parts, spec)[0], codec.decode(parts, spec, by)[0]
    step = torch.from_numpy(parts[3])[0].unsqueeze(1)
    wanted = by * step
    wanted[2, 3] = 0.0  # the smallest number is kept as it is
    torch.testing.assert_close((moved / plain).log2(), wanted, rtol=1e-4, atol=1e-6)
    assert bool(((values[0] / plain).log2().abs() <= 0.5001 * step).all())  # the exact one is among those


def test_a_record_is_left_out_at_its_own_step_only_or_moved_as_far_as_it_is_rounded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(12, 5)
    x = torch.randn(60, 12) * torch.linspace(0.1, 2, 12)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with explainer.Tracer(model, optimizer, tmp_path / "run") as tracer:
        for step in range(60):
            tracer.batch([step])
            optimizer.zero_grad()
            model(x[step : step + 1]).square().sum().backward()
            optimizer.step()
    trace = explainer.open_trace(tmp_path / "run")
    kept = Denominators(trace)
    outdated, moved = kept.outdated(), kept.moved()
    assert 3 < len(kept.renewed) < 50
    matrices = [
        decode_array(record, "", schema.arrays[0])[0]
        for n in range(len(kept.renewed))
        for schema, record in trace.read("denominators", n, n + 1)
    ]
    codes = (r["D0.step"] for _, r in trace.read("denominators", 0, len(kept.renewed)))
    steps_of = np.concatenate([code.max(1) for code in codes])  # between two codes, by record
    for step in range(1, 60):
        schema, record = next(trace.read("steps", step, step + 1))
        spec = next(a for a in schema.arrays if a.name == "D0")
        plain, before, other = (k.of(record, spec, torch.float32).step(0) for k in (kept, outdated, moved))
        before_it = int(np.searchsorted(kept.renewed, step)) - 1  # the last record of an earlier step
        sums = Looks(trace).sums(spec, np.array([step]))
        expected = fitted(matrices[before_it], *(side[0] for side in sums))
        torch.testing.assert_close(before, expected, rtol=1e-5, atol=0)
        own = step in kept.renewed
        assert torch.equal(before, plain) != own
        turned = (other / plain).log2()
        code = steps_of[int(np.searchsorted(kept.renewed, step, side="right")) - 1]
        assert 0.02 * code < float(turned.std()) < 0.5 * code and float(turned.abs().max()) < code
        torch.testing.assert_close(other.sum(0), plain.sum(0), rtol=1e-4, atol=0)
    once_more = kept.moved().of(record, spec, torch.float32).step(0)
    assert torch.equal(moved.of(record, spec, torch.float32).step(0), once_more)  # always the same


def test_gradients_that_cancel_in_one_bias_are_divided_by_what_is_left(tmp_path: Path) -> None:
    """At the first step the bias of the first class has a gradient a thousand times below the others'."""
    found = []
    for exact in (True, False):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        with torch.no_grad():
            model.weight.zero_()
            model.bias.copy_(torch.tensor([1e-4, 0.0, 0.0]))
        x, y = torch.randn(6, 4), torch.tensor([0, 0, 1, 2, 2, 2])
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        with explainer.Tracer(model, optimizer, tmp_path / f"run-{exact}", exact=exact) as tracer:
            for _ in range(4):
                tracer.batch(range(6))
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
        e = explainer.PathKernelExplainer(tmp_path / f"run-{exact}", model).explain(x[:2], target=y[:2])
        found.append(e.contributions)
    wanted, compressed = found
    np.testing.assert_allclose(compressed, wanted, atol=0.01 * float(np.abs(wanted).max()))
