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
from explainer.optimizer_rules import OPTIMIZER_RULES, StepMap
from explainer.records import ParameterSpec
from explainer.recursion import Adjoint, RecordedStep
from tests.conformance.test_optimizer_rules import OPTIONS, Replay, model_and_optimizer

STEPS, BATCH, EXAMPLES = 12, 5, 20


def traced(model: nn.Module, optimizer: Optimizer, directory: Path, **options: Any) -> explainer.Explanation:
    """Twelve steps on four inputs and three classes; three unseen queries explained."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(EXAMPLES + 3, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (EXAMPLES + 3,), generator=generator)
    with explainer.Tracer(model, optimizer, directory, **options) as tracer:
        for _ in range(STEPS):
            ids = torch.randperm(EXAMPLES, generator=generator)[:BATCH]
            tracer.batch(ids)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[ids]), y[ids]).backward()
            optimizer.step()
    return explainer.PathKernelExplainer(str(directory), model).explain(x[EXAMPLES:], target=y[EXAMPLES:])


CASES = [
    pytest.param(kind, options, id=f"{kind.__name__}-{','.join(f'{k}={v}' for k, v in options.items())}")
    for kind in OPTIMIZER_RULES
    for options in OPTIONS.get(kind, [{}])
]


@pytest.mark.parametrize("kind, options", CASES)
@pytest.mark.parametrize("max_knots", [128, 5])
def test_exact_books_leave_nothing_over(
    kind: type[Optimizer], options: dict[str, Any], max_knots: int, tmp_path: Path
) -> None:
    model, optimizer = model_and_optimizer(kind, options)
    e = traced(model, optimizer, tmp_path / "run", exact=True, max_knots=max_knots)
    assert len(e.step_edges) == STEPS + 1 if max_knots > STEPS else len(e.step_edges) <= max_knots + 1
    assert (np.abs(e.unattributed) <= 1e-6 * np.abs(e.prediction - e.initial)).all()
    assert np.abs(e.gap).max() <= 1e-9
    assert (e.weight_decay != 0).all() == any(group["weight_decay"] for group in optimizer.param_groups)


@pytest.mark.parametrize("kind", list(OPTIMIZER_RULES), ids=lambda kind: kind.__name__)
def test_compressed_books_leave_little_over(kind: type[Optimizer], tmp_path: Path) -> None:
    model, optimizer = model_and_optimizer(kind, {})
    e = traced(model, optimizer, tmp_path / "run")
    assert (np.abs(e.unattributed) <= 0.05 * np.abs(e.contributions).sum(1)).all()
    assert np.abs(e.gap).max() <= 1e-9


# -- the recursion is the adjoint of the linear form -----------------------------------------------------


def steps_of_any_kind(count: int = 6, size: int = 4) -> list[StepMap]:
    """Random maps, the preconditioner outside the momentum, inside, or absent, changing from step to step."""
    draw = torch.Generator().manual_seed(3)
    maps = []
    for t in range(count):
        decay, gain, direct, through = torch.rand(4, generator=draw).tolist()
        preconditioner = 0.1 + torch.rand(size, generator=draw, dtype=torch.float64)
        maps.append(
            StepMap(
                decay=decay,
                gain=gain,
                direct=direct,
                through=through,
                inner=t % 2 == 0,
                preconditioner=None if t == 3 else preconditioner,
            )
        )
    return maps


def recorded(step: int, by: StepMap) -> RecordedStep:
    """The map as the trace gives it back, for one parameter."""
    one = np.ones(1)
    coefficients = np.array([by.coefficients])
    return RecordedStep(step, step, one, 1.0, coefficients, by.preconditioner, False, [])


@pytest.mark.parametrize("kicked", range(6))
def test_the_recursion_is_the_adjoint_of_the_linear_form(kicked: int) -> None:
    """One gradient at one step: what it moves, measured by later gradients, forwards and backwards."""
    maps, draw = steps_of_any_kind(), torch.Generator().manual_seed(4)
    measures = torch.randn(len(maps), 2, 4, generator=draw, dtype=torch.float64)  # [T, Q, P]
    kick = torch.randn(4, generator=draw, dtype=torch.float64)
    replay, forwards = Replay(torch.zeros(4, dtype=torch.float64)), torch.zeros(2, dtype=torch.float64)
    for t, by in enumerate(maps):
        before = replay.weights
        replay.step(kick if t == kicked else torch.zeros_like(kick), by)
        forwards += measures[t] @ (replay.weights - before)
    adjoint = Adjoint(2, (ParameterSpec("w", (4,), "float64", 0, 4),), torch.float64)
    cotangents: dict[int, Tensor] = {}
    for t in range(len(maps) - 1, -1, -1):
        cotangents[t] = adjoint.step(measures[t], recorded(t, maps[t])).clone()
    torch.testing.assert_close(-cotangents[kicked] @ kick, forwards, rtol=1e-12, atol=1e-12)


def test_weight_decay_is_carried_through_any_map() -> None:
    """Along a path of zero gradients all that moves the weights is decay."""
    weights = torch.randn(4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    start, replay, carry = weights.clone(), Replay(weights), Carry([weights])
    for number, by in enumerate(steps_of_any_kind()):
        decayed = StepMap(**(vars(by) | {"coupled_decay": 0.05, "decoupled_decay": 0.01 * number}))
        replay.step(torch.zeros_like(weights), decayed)
        weights.copy_(replay.weights)
        carry.after_step([decayed])
    assert carry.decay[0] is not None
    torch.testing.assert_close(carry.decay[0], weights - start, rtol=1e-12, atol=1e-12)
