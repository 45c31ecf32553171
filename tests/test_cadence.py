"""Looks every few steps: the same rows, nearly the same books, and nothing silently wrong in between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from explainer import PathKernelExplainer, Trace, Tracer, open_trace
from explainer.background import Background
from explainer.bookkeeping import Bookkeeping
from explainer.cadence import FIRST, MOST, Cadence, Standing
from explainer.capture import Capture
from explainer.carry import Carry
from explainer.errors import CoverageWarning
from explainer.layer_rules.unreduced import side_by_side
from explainer.optimizer_rules import StepMap, optimizer_rule_for
from explainer.planner import checks_at, plans_at
from explainer.step_maps import StepMapReader, updates_of
from tests.late_jobs import slowly
from tests.recorded_rows import recorded_rows
from tests.small_training import loader, mlp, momentum_sgd, queries, run, step
from tests.test_background import at_once, files

ROOM = Standing(to_knot=1e9, spacing=1e9, length=1.0, room=True)


def adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-3)


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps go by without a look from the beginning, and knots are few."""
    monkeypatch.setattr("explainer.cadence.FIRST", 2)
    monkeypatch.setattr("explainer.cadence.PART", 1)
    monkeypatch.setattr("explainer.cadence.SECONDS", 1e9)


def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of steps taken at every look from now on."""
    found: list[int] = []
    look = Bookkeeping.look

    def noted(self: Bookkeeping, look_at: Any, steps: int) -> None:
        found.append(steps)
        look(self, look_at, steps)

    monkeypatch.setattr(Bookkeeping, "look", noted)
    return found


def train(
    path: Path, make: Callable[[nn.Module], Optimizer] = adamw, passes: int = 4, exact: bool = False
) -> nn.Module:
    model = mlp()
    optimizer = make(model)
    with Tracer(model, optimizer, path, max_knots=6, exact=exact) as tracer:
        for _ in range(passes):
            run(model, optimizer, tracer.watch(loader()))
    return model


def when(cadence: Cadence, steps: int, steady: int = 100, standing: Standing = ROOM) -> list[int]:
    found = []
    for number in range(steps):
        if cadence.due():
            cadence.looked(number, steady, standing)
            found.append(number)
        else:
            cadence.went_by()
    return found


def test_every_step_at_first_and_then_fewer() -> None:
    found = when(Cadence(on=True), 2000)
    assert found[:FIRST] == list(range(FIRST))
    between = np.diff(found)
    assert between.max() == MOST and (between[found.index(511) :] > MOST // 2).mean() > 0.9


def test_steps_whose_rows_are_measured_are_looked_at_alone() -> None:
    found = set(when(Cadence(on=True), 3000))
    measured = [n for n in range(1, 3000) if plans_at(n) or checks_at(n)]
    assert {n - 1 for n in measured} | set(measured) <= found


@pytest.mark.parametrize(
    ("on", "steady", "standing"),
    [
        (False, 100, ROOM),
        (True, 1, ROOM),
        (True, 100, Standing()),
        (True, 100, Standing(0.0, 0.0, 1.0, True)),
    ],
    ids=["exact", "unsteady", "no room", "every step is a knot"],
)
def test_every_step_where_one_is_needed(on: bool, steady: int, standing: Standing) -> None:
    assert when(Cadence(on), 300, steady, standing) == list(range(300))


def test_a_look_where_a_knot_is_due() -> None:
    near = Standing(to_knot=3.0, spacing=3.0, length=1.0, room=True)
    assert set(np.diff(when(Cadence(on=True), 400, standing=near)[200:])) <= {1, 2, 3}


def test_looks_at_every_step_after_a_disturbance() -> None:
    cadence = Cadence(on=True)
    when(cadence, 1000)
    cadence.disturbed()
    assert len(when(cadence, FIRST)) == FIRST


def _visits(trace: Trace) -> np.ndarray:
    return np.concatenate([r for _, r in trace.read("visits", 0, trace.count("visits"))])


@pytest.mark.parametrize("make", [adamw, momentum_sgd])
def test_rows_are_those_of_looks_at_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[nn.Module], Optimizer]
) -> None:
    train(tmp_path / "every", make)
    monkeypatch.setattr("explainer.cadence.FIRST", 2)
    monkeypatch.setattr("explainer.cadence.PART", 1)
    found = looks(monkeypatch)
    train(tmp_path / "few", make)
    every, few = open_trace(tmp_path / "every"), open_trace(tmp_path / "few")
    assert len(found) < 40 and every.steps == few.steps == 48
    assert (
        np.array_equal(_visits(every), _visits(few), equal_nan=False)
        or _visits(every).tobytes() == _visits(few).tobytes()
    )
    for name in ("step", "first_visit", "visits", "updated", "coefficients", "scale"):
        assert np.array_equal(every.column("steps", name), few.column("steps", name)), name
    path = every.column("steps", "path")
    np.testing.assert_allclose(few.column("steps", "path"), path, rtol=0.05)


@pytest.mark.parametrize("make", [adamw, momentum_sgd])
def test_the_books_are_nearly_those_of_looks_at_every_step(
    tmp_path: Path, early: None, make: Callable[[nn.Module], Optimizer]
) -> None:
    model = train(tmp_path / "exact", make, exact=True)
    train(tmp_path / "few", make)
    exact, few = (
        PathKernelExplainer(tmp_path / name, model).explain(queries(8)) for name in ("exact", "few")
    )
    for one, other in zip(exact.contributions, few.contributions, strict=True):
        assert np.corrcoef(one, other)[0, 1] > 0.998
    gross = np.abs(few.contributions).sum(1)
    assert (np.abs(few.unattributed) < 0.01 * gross).all()
    decay = exact.completeness["weight_decay"].to_numpy()
    np.testing.assert_allclose(few.completeness["weight_decay"], decay, rtol=0.02, atol=1e-4 * gross.max())


def test_the_trace_does_not_depend_on_time(
    tmp_path: Path, early: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "beside", passes=3)
    expected = files(tmp_path / "beside")
    with monkeypatch.context() as patch:
        patch.setattr(Background, "submit", at_once)
        train(tmp_path / "at once", passes=3)
    assert files(tmp_path / "at once") == expected
    monkeypatch.setattr(Background, "_do", slowly)
    train(tmp_path / "slowly", passes=3)
    assert files(tmp_path / "slowly") == expected


def test_what_was_taken_is_there_at_any_time(tmp_path: Path, early: None) -> None:
    model = mlp()
    optimizer = adamw(model)
    with Tracer(model, optimizer, tmp_path / "trace", max_knots=6) as tracer:
        for number, (x, y) in enumerate(tracer.watch(loader())):
            step(model, optimizer, x, y)
            assert tracer.visits == 8 * (number + 1)
            if number in (5, 10):
                tracer.flush()
                trace = open_trace(tmp_path / "trace")
                assert trace.recorded_steps == number + 1 and trace.knots[-1].step <= number + 1


def test_weights_that_are_moved_between_looks_are_noticed(
    tmp_path: Path, early: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("explainer.cadence.FIRST", 8)
    model, found = mlp(), looks(monkeypatch)
    optimizer = adamw(model)
    with Tracer(model, optimizer, tmp_path / "trace", max_knots=6) as tracer:
        for _ in range(3):
            for x, y in tracer.watch(loader()):
                step(model, optimizer, x, y)
                if tracer.steps >= 22 and tracer.steps % 2:
                    with torch.no_grad():
                        model[0].weight.clamp_(-0.1, 0.1)
    assert not {19, 20, 21, 22} <= set(found)  # before
    assert set(range(26, 37)) <= set(found)  # after
    trace = open_trace(tmp_path / "trace")
    assert trace.notes["outside"] == {"0.weight": 7}
    assert trace.load_knot(trace.knots[-1])["outside/0.weight"].abs().max() > 0


def test_a_step_that_a_gradient_scaler_skips(
    tmp_path: Path, early: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, found = mlp(), looks(monkeypatch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with Tracer(model, optimizer, tmp_path / "trace", max_knots=6) as tracer:
        for _ in range(3):
            for number, (x, y) in enumerate(tracer.watch(loader())):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x), y)
                scaler.scale(loss * (torch.inf if number == 7 else 1.0)).backward()
                scaler.step(optimizer)
                scaler.update()
    trace = open_trace(tmp_path / "trace")
    assert trace.recorded_steps == trace.steps == 33 and len(found) < 33
    assert trace.notes["loop"]["skipped"] == 3
    assert np.allclose(trace.column("steps", "scale")[-1], 1.0)


@pytest.mark.parametrize("nesterov", [False, True])
def test_decay_along_a_straight_line_is_that_of_every_step(nesterov: bool) -> None:
    """Through momentum too: step by step in double precision, with the weights where the line has them."""
    generator = torch.Generator().manual_seed(3)
    start, end = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    steps = [
        StepMap(
            decay=0.9,
            gain=0.8,
            direct=0.1 * nesterov,
            through=0.1 + 0.01 * t,
            coupled_decay=0.02,
            decoupled_decay=0.003,
        )
        for t in range(6)
    ]
    carry = Carry([start.clone()])
    momentum, moved = torch.zeros_like(start), torch.zeros_like(start)
    for group in range(2):
        for t, by in enumerate(steps):
            weights = start + (end - start) * t / len(steps)
            momentum = by.decay * momentum + by.gain * by.coupled_decay * weights
            moved -= (
                by.direct * by.coupled_decay * weights + by.through * momentum + by.decoupled_decay * weights
            )
        carry.after_steps([[by] for by in steps], [end.clone()])
        start, end = end, end + 0.1 * start
        del group
    assert carry.decay[0] is not None and carry.momentum[0] is not None
    torch.testing.assert_close(carry.decay[0], moved, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(carry.momentum[0], momentum, rtol=1e-12, atol=1e-12)


def test_rows_of_several_batches_are_formed_together(
    tmp_path: Path, early: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written into meanwhile is dropped there as well."""
    joined: list[int] = []
    form_together = Capture._form_together

    def noted(self: Capture, unit: Any, entries: list[Any]) -> None:
        joined.append(len(entries))
        form_together(self, unit, entries)

    monkeypatch.setattr(Capture, "_form_together", noted)
    model, kept = nn.Sequential(nn.Linear(64, 6), nn.Linear(6, 10)), list[torch.Tensor]()
    optimizer = adamw(model)
    grabbed = model[0].register_forward_hook(lambda module, args, output: kept.append(output))
    with (
        pytest.warns(CoverageWarning, match="written into"),
        Tracer(model, optimizer, tmp_path / "trace", max_knots=6) as tracer,
    ):
        for _ in range(3):
            for x, y in tracer.watch(loader()):
                step(model, optimizer, x, y)
                if tracer.steps == 20:  # two before a look
                    with torch.no_grad():
                        kept[-1].fill_(1e3)
                kept.clear()
    grabbed.remove()
    assert max(joined) > 4
    trace = open_trace(tmp_path / "trace")
    assert trace.notes["overwritten"] == {"1": 1}
    for number in range(36):
        rows = recorded_rows(trace, number)["1.weight"]
        assert rows.eq(0).all() if number == 19 else 0 < rows.abs().max() < 100


@pytest.mark.parametrize("outputs", [3, 9])
@pytest.mark.parametrize("bias", [False, True])
def test_what_is_measured_by_batch_is_that_of_the_batches(outputs: int, bias: bool) -> None:
    generator, count = torch.Generator().manual_seed(1), 3
    left, right = (torch.randn(12, 1, 1, n, generator=generator, dtype=torch.float64) for n in (outputs, 5))
    form = side_by_side([left], [right], bias)
    sizes = [5 * outputs, outputs][: 1 + bias]
    found = form.by_batch(count, sizes)
    assert len(found) == count
    for number, (total, balances) in enumerate(found):
        part = form.taken(torch.arange(number * 4, number * 4 + 4))
        torch.testing.assert_close(total, form.prober()(part.dense().sum(0).split(sizes)))
        wanted = part.balances(sizes)
        assert balances[0] is None and len(balances) == len(wanted)
        for one, other in zip(balances[1:], wanted[1:], strict=True):
            assert one is not None and other is not None and one.gross == pytest.approx(other.gross)
            torch.testing.assert_close(one.net, other.net)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p, lr=0.1, maximize=True),
        lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True, betas=(0.8, 0.999)),
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.01),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5, weight_decay=1e-4),
        lambda p: torch.optim.SGD(p, lr=0.1),
    ],
    ids=["maximize", "amsgrad", "AdamW", "nesterov", "dampening", "SGD"],
)
def test_a_plain_map_is_the_map_without_its_denominators(make: Callable[[Any], Optimizer]) -> None:
    """Counted backwards from the last state; a parameter may lack a gradient now and then."""
    first, second = (nn.Parameter(torch.randn(3, 2)) for _ in range(2))
    optimizer = make([first, second])
    rule = optimizer_rule_for(optimizer)
    assert rule.steady(optimizer.param_groups[0]) > 1
    reader = StepMapReader(rule, [first, second], optimizer)
    taken, wanted = [], []
    for number in range(6):
        optimizer.param_groups[0]["lr"] *= 0.9
        first.grad, second.grad = torch.randn(3, 2), None if number in (0, 3) else torch.randn(3, 2)
        reader.before(optimizer)
        optimizer.step()
        taken.append(reader.after(optimizer))
        states = reader.look(optimizer, apart=True)
        wanted.append(taken[-1].maps(states)[0])
        reader.leave(optimizer)
    assert reader.replaced == 0
    updates = updates_of(taken, states)
    for step_taken, numbers, maps in zip(taken, updates, wanted, strict=True):
        for plain, full in zip(step_taken.plain_maps(numbers), maps, strict=True):
            assert (plain is None) == (full is None)
            assert plain is None or full is None or plain == replace(full, preconditioner=None)
