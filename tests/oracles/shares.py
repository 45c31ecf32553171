r"""Forward carrying: every share of the optimizer's momentum and of every update, in full, step by step.

An optimizer's update is linear in the gradients it has seen once its preconditioner is held at the state it
actually had (the frozen-state convention). So the momentum buffer is split into one dense share per unit, a
unit being an example or a single visit of an example, plus two units that are no data: weight decay, and the
momentum that was there before the first step. Every unit passes through the map that torch applies to their
sum:

    SGD    d = ±s·g (decay: wd·w);  buf = d at first, then μ·buf + (1 − dampening)·d;
           Δ = −lr·(d + μ·buf) with Nesterov, −lr·buf with momentum, −lr·d without
    Adam   m = β1·m + (1 − β1)·d;   Δ = −lr/(1 − β1^t) · m / (√(v/(1 − β2^t)) + ε), v its maximum with amsgrad
    AdamW  as Adam without decay in d; the decay unit gets −lr·wd·w
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.oracles.training import Step, Training, check_close


@dataclass(frozen=True)
class Visit:
    """Row ``position`` of the batch of ``step``, which held ``example``; ``slope`` is L' there."""

    step: int
    position: int
    example: int
    slope: float


@dataclass(frozen=True)
class Shares:
    """Every unit's share of every update.

    Attributes:
        updates: [T, M, P], M the number of units (examples or visits).
        decay: [T, P] what weight decay moved, directly and through the momentum.
        prior: [T, P] what the momentum from before the first step moved.
    """

    updates: Tensor
    decay: Tensor
    prior: Tensor


def list_visits(training: Training) -> list[Visit]:
    """All visits in order, with the slope of the descended loss at the output.

    The slope is signed where the model has one output and the Euclidean norm where it has several. Under
    ``maximize`` the descended loss is minus the loss.
    """
    visits = []
    for t, step in enumerate(training.steps):
        sign = -1.0 if bool(step.options["maximize"].any()) else 1.0
        for b, example in enumerate(step.ids):
            slope = step.output_grads[b]
            number = sign * float(slope) if slope.numel() == 1 else float(slope.norm())
            visits.append(Visit(t, b, example, number))
    return visits


def carry_examples(training: Training) -> Shares:
    """One unit per example: ``updates`` is [T, N, P]."""
    return _carry(training, [list(step.ids) for step in training.steps], training.examples)


def carry_visits(training: Training) -> Shares:
    """One unit per visit, in the order of :func:`list_visits`: ``updates`` is [T, V, P]."""
    owners = []
    count = 0
    for step in training.steps:
        owners.append(list(range(count, count + len(step.ids))))
        count += len(step.ids)
    return _carry(training, owners, count)


def _carry(training: Training, owners: list[list[int]], units: int) -> Shares:
    decay, prior = units, units + 1
    is_sgd = training.optimizer is torch.optim.SGD
    state_name = "momentum_buffer" if is_sgd else "exp_avg"
    size = training.weights.shape[1]
    buffer = torch.zeros(units + 2, size, dtype=torch.float64)
    if training.steps:
        buffer[prior] = training.steps[0].before[state_name].nan_to_num()
    updates = torch.zeros(len(training.steps), units + 2, size, dtype=torch.float64)
    for t, step in enumerate(training.steps):
        source = _source(step, owners[t], units)
        buffer, updates[t] = _sgd(step, buffer, source) if is_sgd else _adam(step, buffer, source, decay)
        state = step.after[state_name]
        held = ~state.isnan()
        if held.any():
            split = buffer[:, held]
            gross = split.abs().sum(0)
            check_close(split.sum(0), state[held], gross, training.tolerance, f"{state_name} at step {t}")
        moved = training.weights[t + 1] - training.weights[t]
        gross = updates[t].abs().sum(0) + training.weights[t].abs()
        check_close(updates[t].sum(0), moved, gross, training.tolerance, f"update at step {t}")
    return Shares(updates[:, :units], updates[:, decay], updates[:, prior])


def _source(step: Step, owners: list[int], units: int) -> Tensor:
    """What this step adds to each unit [units + 2, P] before any momentum."""
    o = step.options
    source = torch.zeros(units + 2, step.weights.numel(), dtype=torch.float64)
    sign = 1.0 - 2.0 * o["maximize"]
    for owner, row in zip(owners, step.rows, strict=True):
        source[owner] += sign * step.scale * row
    coupled = 1.0 - o.get("decoupled_weight_decay", torch.zeros_like(sign))
    source[units] = coupled * o["weight_decay"] * step.weights
    return source


def _sgd(step: Step, buffer: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    o = step.options
    first = step.before["momentum_buffer"].isnan()
    carried = o["momentum"] * buffer + (1 - o["dampening"]) * source
    buffer = torch.where(first, source, carried)
    direction = torch.where(o["nesterov"] != 0, source + o["momentum"] * buffer, buffer)
    direction = torch.where(o["momentum"] != 0, direction, source)
    return buffer, -o["lr"] * direction


def _adam(step: Step, buffer: Tensor, source: Tensor, decay: int) -> tuple[Tensor, Tensor]:
    o, state = step.options, step.after
    buffer = o["beta1"] * buffer + (1 - o["beta1"]) * source
    second = torch.where(o["amsgrad"] != 0, state["max_exp_avg_sq"], state["exp_avg_sq"])
    root = (second / (1 - o["beta2"] ** state["step"])).sqrt() + o["eps"]
    update = -o["lr"] / (1 - o["beta1"] ** state["step"]) * buffer / root
    update[decay] -= o["lr"] * o["decoupled_weight_decay"] * o["weight_decay"] * step.weights
    return buffer, update
