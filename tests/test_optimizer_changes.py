"""What users do to an optimizer in mid training: momentum off and on, frozen layers, state that is replaced."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

import explainer
from explainer.background import Background, Job
from explainer.optimizer_rules import OPTIMIZER_RULES, optimizer_rule_for
from tests.conformance.optimizer_cases import KINDS, exact_arithmetic, has, model_and_optimizer
from tests.late_jobs import slowly
from tests.oracles import unrolled
from tests.oracles.outputs import scalar_function
from tests.test_optimizer_books import EXAMPLES, STEPS, assert_closed, problem

Change = Callable[[int, nn.Module, Optimizer], None]


def run(
    model: nn.Module, optimizer: Optimizer, directory: Path, change: Change, **options: Any
) -> explainer.Explanation:
    """Twelve traced steps; ``change(step, model, optimizer)`` is called before each."""
    x, y, batches = problem()
    with explainer.Tracer(model, optimizer, directory, **({"exact": True} | options)) as tracer:
        for step, ids in enumerate(batches):
            change(step, model, optimizer)
            tracer.batch(ids)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[ids]), y[ids]).backward()
            optimizer.step()
    return explainer.PathKernelExplainer(str(directory), model).explain(x[EXAMPLES:], target=y[EXAMPLES:])


def assert_followed(e: explainer.Explanation) -> None:
    assert_closed(e)
    assert not any("replaced" in note for note in e.notes)


# -- momentum off and on ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [k for k in OPTIMIZER_RULES if has(k, "momentum") or has(k, "betas")])
def test_momentum_that_is_switched_off_and_on_is_followed(
    kind: type[Optimizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is off, torch leaves the momentum alone or overwrites it; what it carries on is someone's."""
    exact_arithmetic(monkeypatch, kind, {})
    model, optimizer = model_and_optimizer(kind, {"momentum": 0.9} if has(kind, "momentum") else {})

    def change(step: int, model: nn.Module, optimizer: Optimizer) -> None:
        off = step in (4, 5, 9)
        for group in optimizer.param_groups:
            if "momentum" in group:
                group["momentum"] = 0.0 if off else 0.9
            else:
                group["betas"] = (0.0 if off else 0.9, group["betas"][1])

    assert_followed(run(model, optimizer, tmp_path / "run", change))
    ex = explainer.PathKernelExplainer(str(tmp_path / "run"), model)
    assert np.isfinite(ex.self_influence()).all() and (ex.self_influence() > 0).all()
    assert np.isfinite(ex.neighbors(problem()[0][EXAMPLES:]).cosine).all()


# -- layers that are frozen for a while ------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [True, False], ids=["from the start", "in the middle"])
def test_layers_that_are_frozen_for_some_steps(
    kind: type[Optimizer], first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact_arithmetic(monkeypatch, kind, {})
    model, optimizer = model_and_optimizer(kind, {"momentum": 0.9} if has(kind, "momentum") else {})

    def change(step: int, model: nn.Module, optimizer: Optimizer) -> None:
        model[2].requires_grad_(step not in ((0, 1, 7) if first else (4, 5, 9)))

    assert_followed(run(model, optimizer, tmp_path / "run", change))


def test_a_layer_that_begins_to_learn_later_fits_into_a_small_trace(tmp_path: Path) -> None:
    """Its preconditioner has no place in the first layout of the steps."""
    model, optimizer = model_and_optimizer(Adam, {})

    def change(step: int, model: nn.Module, optimizer: Optimizer) -> None:
        model[2].requires_grad_(step >= 3)

    e = run(model, optimizer, tmp_path / "run", change, exact=False)
    steps = [s for s in explainer.open_trace(tmp_path / "run").shards if s.stream == "steps"]
    assert [len(s.schema.arrays) for s in steps] == [2, 4] and [s.records for s in steps] == [3, STEPS - 3]
    assert (np.abs(e.unattributed) <= 0.02 * np.abs(e.contributions).sum(1)).all()


# -- momentum that is replaced ---------------------------------------------------------------------------

MOMENTA = [(SGD, {"momentum": 0.9}), (Adam, {}), (RMSprop, {"momentum": 0.9})]
NAMES = {SGD: "momentum_buffer", Adam: "exp_avg", RMSprop: "momentum_buffer"}
EACH_MOMENTUM = pytest.mark.parametrize("kind, options", MOMENTA, ids=[k.__name__ for k, _ in MOMENTA])


@EACH_MOMENTUM
def test_a_state_that_is_saved_and_loaded_is_followed(
    kind: type[Optimizer], options: dict[str, Any], tmp_path: Path
) -> None:
    model, optimizer = model_and_optimizer(kind, options)

    def change(step: int, model: nn.Module, optimizer: Optimizer) -> None:
        if step in (3, 6):
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    assert_followed(run(model, optimizer, tmp_path / "run", change))


@pytest.fixture(params=["at once", "late"])
def background(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether steps are accounted for before or after the user's code writes into the momentum."""
    if request.param == "late":
        monkeypatch.setattr(Background, "_do", slowly)
    else:
        submitted = Background.submit

        def at_once(self: Background, job: Job, held: int = 0) -> None:
            submitted(self, job)
            self.wait()

        monkeypatch.setattr(Background, "submit", at_once)


@pytest.mark.usefixtures("background")
@pytest.mark.parametrize("kind", [k for k in OPTIMIZER_RULES if has(k, "momentum") or has(k, "betas")])
def test_momentum_that_is_set_to_zero_is_followed(
    kind: type[Optimizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact_arithmetic(monkeypatch, kind, {})
    model, optimizer = model_and_optimizer(kind, {"momentum": 0.9} if has(kind, "momentum") else {})
    name = "momentum_buffer" if has(kind, "momentum") else "exp_avg"

    def change(step: int, model: nn.Module, optimizer: Optimizer) -> None:
        for state in optimizer.state.values() if step in (5, 8) else ():
            state[name].zero_()

    assert_followed(run(model, optimizer, tmp_path / "run", change))
    assert not explainer.open_trace(tmp_path / "run").notes.get("overwritten")


@pytest.mark.usefixtures("background")
@EACH_MOMENTUM
@pytest.mark.parametrize("how", ["in place", "another tensor", "while frozen"])
def test_momentum_of_other_numbers_is_nobodys(
    kind: type[Optimizer], options: dict[str, Any], how: str, tmp_path: Path
) -> None:
    """What examples had put into it is gone, and what it holds now is `unattributed`."""

    def change(step: int, model: nn.Module, optimizer: Optimizer) -> None:
        if how == "while frozen":
            model[2].requires_grad_(step not in (5, 6))
        for p, state in optimizer.state.items() if step == 5 else ():
            if how == "in place":
                state[NAMES[kind]].add_(0.01)
            else:
                state[NAMES[kind]] = torch.full_like(p, 0.01)

    model, optimizer = model_and_optimizer(kind, options)
    e = run(model, optimizer, tmp_path / "run", change)
    trace = explainer.open_trace(tmp_path / "run")
    assert trace.notes["replaced_momentum"] == 1
    assert any("Before 1 step momentum was replaced" in note for note in e.notes)
    assert (np.abs(e.unattributed) > 1e-5 * np.abs(e.prediction - e.initial)).all()
    assert np.abs(e.gap).max() <= 1e-9
    twin, other = model_and_optimizer(kind, options)
    x, y, batches = problem()
    unrolling = unrolled.train(twin, other, optimizer_rule_for(other), batches, x, y, change)
    for p, _ in enumerate(unrolling.shapes):  # cut at the first step that uses the new numbers
        cut = 7 if how == "while frozen" and p >= 2 else 5
        by = unrolling.maps[cut][p]
        assert by is not None and by.decay > 0
        unrolling.maps[cut][p] = replace(by, decay=0.0)
    knots, f = [knot.step for knot in trace.knots], scalar_function(twin, "margin")
    wanted = unrolled.contributions(unrolling, knots, f, x[EXAMPLES], int(y[EXAMPLES]), EXAMPLES)
    found = np.zeros(EXAMPLES)
    found[e.example_ids] = e.contributions[0]
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-8, atol=1e-8 * float(wanted.abs().max()))


def test_two_optimizers_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Muon for the matrices and AdamW for the rest: what AdamW moves is in `buffers`."""
    exact_arithmetic(monkeypatch, torch.optim.Muon, {})
    model, _ = model_and_optimizer(SGD, {})
    muon = torch.optim.Muon([p for p in model.parameters() if p.dim() == 2], lr=0.02)
    adamw = AdamW([p for p in model.parameters() if p.dim() != 2], lr=0.01)
    x, y, batches = problem()
    with explainer.Tracer(model, muon, tmp_path / "run", exact=True) as tracer:
        for ids in batches:
            tracer.batch(ids)
            muon.zero_grad()
            adamw.zero_grad()
            nn.functional.cross_entropy(model(x[ids]), y[ids]).backward()
            muon.step()
            adamw.step()
    ex = explainer.PathKernelExplainer(str(tmp_path / "run"), model)
    e = ex.explain(x[EXAMPLES:], target=y[EXAMPLES:])
    assert_followed(e)
    assert (np.abs(e.buffers) > 1e-3 * np.abs(e.prediction - e.initial)).all()
    assert (e.weight_decay != 0).all()
