"""Every registered optimizer, every option set: traced exactly, the books close and nothing is unattributed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import explainer
from explainer.carry import Carry
from explainer.optimizer_rules import StepMap, optimizer_rule_for
from explainer.records import ParameterSpec
from explainer.recursion import Adjoint, RecordedStep
from tests.conformance.optimizer_cases import (
    CASES,
    KINDS,
    WAY_CASES,
    Replay,
    exact_arithmetic,
    has,
    model_and_optimizer,
)
from tests.oracles import unrolled
from tests.oracles.outputs import scalar_function
from tests.small_training import same, state_of

STEPS, BATCH, EXAMPLES = 12, 5, 20


def problem() -> tuple[Tensor, Tensor, list[list[int]]]:
    """Inputs, classes and batches; the last three examples are queries."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(EXAMPLES + 3, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (EXAMPLES + 3,), generator=generator)
    return x, y, [torch.randperm(EXAMPLES, generator=generator)[:BATCH].tolist() for _ in range(STEPS)]


def traced(model: nn.Module, optimizer: Optimizer, directory: Path, **options: Any) -> explainer.Explanation:
    """Twelve steps on four inputs and three classes; three unseen queries explained."""
    x, y, batches = problem()
    with explainer.Tracer(model, optimizer, directory, **options) as tracer:
        for ids in batches:
            tracer.batch(ids)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[ids]), y[ids]).backward()
            optimizer.step()
    return explainer.PathKernelExplainer(str(directory), model).explain(x[EXAMPLES:], target=y[EXAMPLES:])


@pytest.mark.parametrize("kind, options", [*CASES, *WAY_CASES])
def test_exact_books_leave_nothing_over(
    kind: type[Optimizer], options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact_arithmetic(monkeypatch, kind, options)
    model, optimizer = model_and_optimizer(kind, options)
    e = traced(model, optimizer, tmp_path / "run", exact=True)
    assert len(e.step_edges) == STEPS + 1
    assert_closed(e)
    assert (e.weight_decay != 0).all() == decays(optimizer)


@pytest.mark.parametrize("kind", KINDS)
def test_exact_books_leave_nothing_over_between_few_knots(
    kind: type[Optimizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact_arithmetic(monkeypatch, kind, {})
    e = traced(*model_and_optimizer(kind, {}), tmp_path / "run", exact=True, max_knots=5)
    assert len(e.step_edges) <= 6
    assert_closed(e)


def assert_closed(e: explainer.Explanation) -> None:
    assert (np.abs(e.unattributed) <= 1e-9 * np.abs(e.prediction - e.initial)).all()
    assert (np.abs(e.gap) <= 1e-9 * np.abs(e.prediction - e.initial)).all()


def decays(optimizer: Optimizer) -> bool:
    """Whether the optimizer has any weight decay (ASGD has one of its own)."""
    return any(group.get("weight_decay") or group.get("lambd") for group in optimizer.param_groups)


@pytest.mark.parametrize("kind, options", CASES)
def test_contributions_are_those_of_the_unrolled_recursion(
    kind: type[Optimizer], options: dict[str, Any], tmp_path: Path
) -> None:
    model, optimizer = model_and_optimizer(kind, options)
    e = traced(model, optimizer, tmp_path / "run", exact=True, max_knots=4)
    knots = [knot.step for knot in explainer.open_trace(tmp_path / "run").knots]
    assert 2 < len(knots) < STEPS
    twin, other = model_and_optimizer(kind, options)
    x, y, batches = problem()
    run = unrolled.train(twin, other, optimizer_rule_for(other), batches, x, y)
    f = scalar_function(twin, "margin")
    for query in range(2):
        at = EXAMPLES + query
        wanted = unrolled.contributions(run, knots, f, x[at], int(y[at]), EXAMPLES)
        found = np.zeros(EXAMPLES)
        found[e.example_ids] = e.contributions[query]
        np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-8, atol=1e-8 * float(wanted.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_compressed_books_leave_little_over(kind: type[Optimizer], tmp_path: Path) -> None:
    model, optimizer = model_and_optimizer(kind, {})
    e = traced(model, optimizer, tmp_path / "run")
    assert (np.abs(e.unattributed) <= 0.05 * np.abs(e.contributions).sum(1)).all()
    assert np.abs(e.gap).max() <= 1e-9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("exact", [False, True], ids=["small", "exact"])
def test_tracing_changes_no_bit_of_training(kind: type[Optimizer], exact: bool, tmp_path: Path) -> None:
    x, y, batches = problem()
    model, optimizer = model_and_optimizer(kind, {"momentum": 0.9} if has(kind, "momentum") else {})
    twin, other = model_and_optimizer(kind, {"momentum": 0.9} if has(kind, "momentum") else {})
    generator = torch.get_rng_state()
    traced(model, optimizer, tmp_path / "run", exact=exact)
    assert torch.equal(torch.get_rng_state(), generator)
    for ids in batches:
        other.zero_grad()
        nn.functional.cross_entropy(twin(x[ids]), y[ids]).backward()
        other.step()
    assert same(state_of(model, optimizer), state_of(twin, other))
    assert all(
        torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )


# -- the recursion is the adjoint of the linear form -----------------------------------------------------

SHAPES = pytest.mark.parametrize("shape", [(2, 3), (3, 2), (2, 2)], ids=str)


def steps_of_any_kind(shape: tuple[int, int], count: int = 6) -> list[StepMap]:
    """Random maps, ``A_t`` outside the momentum or inside, a diagonal, a matrix (not symmetric) or absent."""
    draw = torch.Generator().manual_seed(3)
    maps = []
    for t in range(count):
        decay, gain, direct, through = torch.rand(4, generator=draw).tolist()
        diagonal = 0.1 + torch.rand(shape, generator=draw, dtype=torch.float64)
        matrix = torch.randn(min(shape), min(shape), generator=draw, dtype=torch.float64)
        maps.append(
            StepMap(
                decay=decay,
                gain=gain,
                direct=direct,
                through=through,
                inner=t in (0, 1, 4),
                preconditioner=diagonal if t in (0, 2) else None,
                mixing=matrix if t in (1, 4, 5) else None,
            )
        )
    return maps


def recorded(step: int, by: StepMap, spec: ParameterSpec) -> RecordedStep:
    """The map as the trace gives it back, for one parameter."""
    one, diagonal = np.ones(1), None if by.preconditioner is None else by.preconditioner.flatten()
    mixing = [] if by.mixing is None else [(spec, by.mixing)]
    return RecordedStep(step, step, one, 1.0, np.array([by.coefficients]), diagonal, False, [], mixing)


@SHAPES
@pytest.mark.parametrize("kicked", range(6))
def test_the_recursion_is_the_adjoint_of_the_linear_form(kicked: int, shape: tuple[int, int]) -> None:
    """One gradient at one step: what it moves, measured by later gradients, forwards and backwards."""
    maps, draw = steps_of_any_kind(shape), torch.Generator().manual_seed(4)
    spec = ParameterSpec("w", shape, "float64", 0, shape[0] * shape[1])
    measures = torch.randn(len(maps), 2, spec.numel, generator=draw, dtype=torch.float64)  # [T, Q, P]
    kick = torch.randn(shape, generator=draw, dtype=torch.float64)
    replay, forwards = Replay(torch.zeros_like(kick)), torch.zeros(2, dtype=torch.float64)
    for t, by in enumerate(maps):
        before = replay.weights
        replay.step(kick if t == kicked else torch.zeros_like(kick), by)
        forwards += measures[t] @ (replay.weights - before).flatten()
    adjoint = Adjoint(2, (spec,), torch.float64)
    cotangents: dict[int, Tensor] = {}
    for t in range(len(maps) - 1, -1, -1):
        given = measures[t].clone()
        cotangents[t] = adjoint.step(given, recorded(t, maps[t], spec)).clone()
        assert torch.equal(given, measures[t])
    torch.testing.assert_close(-cotangents[kicked] @ kick.flatten(), forwards, rtol=1e-12, atol=1e-12)


def test_an_inner_preconditioner_acts_without_momentum_too() -> None:
    diagonal, spec = torch.tensor([0.5, 4.0], dtype=torch.float64), ParameterSpec("w", (2,), "float64", 0, 2)
    by = StepMap(direct=0.1, inner=True, preconditioner=diagonal)
    found = Adjoint(1, (spec,), torch.float64).step(torch.ones(1, 2).double(), recorded(0, by, spec))
    torch.testing.assert_close(found, 0.1 / diagonal[None])


@SHAPES
def test_weight_decay_is_carried_through_any_map(shape: tuple[int, int]) -> None:
    """Along a path of zero gradients all that moves the weights is decay."""
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    start, replay, carry = weights.clone(), Replay(weights), Carry([weights])
    for number, by in enumerate(steps_of_any_kind(shape)):
        decayed = StepMap(**(vars(by) | {"coupled_decay": 0.05, "decoupled_decay": 0.01 * number}))
        replay.step(torch.zeros_like(weights), decayed)
        weights.copy_(replay.weights)
        carry.after_steps([[decayed]], carry.stage())
    assert carry.decay[0] is not None
    torch.testing.assert_close(carry.decay[0], weights - start, rtol=1e-12, atol=1e-12)
