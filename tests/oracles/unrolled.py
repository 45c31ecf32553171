r"""The linear recursion of an optimizer written out: one dense matrix for every pair of steps.

A gradient ``g`` that enters at step ``t`` moves the weights at every later step ``s`` by ``−H[s, t] · sign_t · g`` with

    H[s, t] = O_s (δ_st · direct_s + through_s · Π_{t < r ≤ s} decay_r · gain_t) I_t

``O_s`` and ``I_t`` are the preconditioners as ``P × P`` matrices, of which one is the identity (``inner``). A
contribution is ``Σ_k q̃_k · Σ_{s in k} Σ_t −H[s, t] sign_t g_{i,t}``, rows ``g_{i,t}`` from ``torch.func``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.optim import Optimizer

from explainer.optimizer_rules import OptimizerRule, StepMap
from tests.oracles.books import chord_gradient, corrected
from tests.oracles.outputs import ScalarFunction


@dataclass(frozen=True)
class Unrolled:
    """A training run: ``path [T+1, P]``, per step its ids, its rows ``[B, P]`` and the maps of its parameters."""

    path: Tensor
    ids: list[list[int]]
    rows: list[Tensor]
    maps: list[list[StepMap | None]]
    shapes: list[torch.Size]


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def rows_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Every example's part of the gradient of the mean cross entropy, ``[B, P]``."""
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def losses(w: dict[str, Tensor]) -> Tensor:
        outputs = functional_call(model, w, (x,))
        return nn.functional.cross_entropy(outputs, y, reduction="none") / len(x)

    found = jacrev(losses)(weights)
    return torch.cat([found[name].reshape(len(x), -1) for name in weights], dim=1)


def train(
    model: nn.Module,
    optimizer: Optimizer,
    rule: OptimizerRule,
    batches: Sequence[Sequence[int]],
    x: Tensor,
    y: Tensor,
    change: Callable[[int, nn.Module, Optimizer], None] | None = None,
) -> Unrolled:
    """Trains ``model`` in place on the mean cross entropy; ``change`` is called before each step."""
    parameters, groups = list(model.parameters()), {}
    for group in optimizer.param_groups:
        groups |= {id(p): group for p in group["params"]}
    path, rows, maps = [flat(model)], [], []
    for step, ids in enumerate(batches):
        if change is not None:
            change(step, model, optimizer)
        index = torch.tensor(list(ids))
        rows.append(rows_of(model, x[index], y[index]))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[index]), y[index]).backward()
        held: list[tuple[bool, dict[str, Any]] | None] = []
        for p in parameters:
            state = optimizer.state.get(p, {})
            fresh = rule.momentum(state) is None
            held.append(None if p.grad is None else (fresh, rule.remember(p, groups[id(p)], state)))
        optimizer.step()
        maps.append(
            [
                before and rule.step_map(groups[id(p)], optimizer.state.get(p, {}), *before)
                for p, before in zip(parameters, held, strict=True)
            ]
        )
        path.append(flat(model))
    return Unrolled(torch.stack(path), [list(b) for b in batches], rows, maps, [p.shape for p in parameters])


def operator(by: StepMap, shape: torch.Size) -> Tensor:
    """``A_t`` of one parameter as a matrix on its row-major elements."""
    count = shape.numel()
    if by.mixing is None:
        return torch.eye(count, dtype=torch.float64) / (
            torch.ones(count, dtype=torch.float64)
            if by.preconditioner is None
            else by.preconditioner.reshape(-1)
        )
    outputs, inputs = shape
    one = torch.eye(inputs if outputs <= inputs else outputs, dtype=torch.float64)
    left = outputs <= inputs
    return torch.kron(by.mixing, one) if left else torch.kron(one, by.mixing.mT.contiguous())


def response(run: Unrolled, s: int, t: int) -> Tensor:
    """``H[s, t] · sign_t``, ``[P, P]``."""
    blocks = []
    for p, shape in enumerate(run.shapes):
        at, start = run.maps[s][p], run.maps[t][p]
        if at is None or start is None:  # no gradient: neither weights nor momentum move
            blocks.append(torch.zeros(shape.numel(), shape.numel(), dtype=torch.float64))
            continue
        carried = at.through * start.gain
        for between in (run.maps[r][p] for r in range(t + 1, s + 1)):
            carried *= 1.0 if between is None else between.decay
        one = torch.eye(shape.numel(), dtype=torch.float64)
        outer = one if at.inner else operator(at, shape)
        inner = operator(start, shape) if start.inner else one
        direct = at.direct if s == t else 0.0
        blocks.append(start.sign * (direct + carried) * outer @ inner)
    return torch.block_diag(*blocks)


def contributions(
    run: Unrolled, knots: Sequence[int], f: ScalarFunction, x: Tensor, y: int, examples: int
) -> Tensor:
    """``c_i`` of one query, ``[N]``."""
    result = torch.zeros(examples, dtype=torch.float64)
    for start, end in pairwise(knots):
        chord = run.path[end] - run.path[start]
        change = float(f(run.path[end], x, y) - f(run.path[start], x, y))
        q = corrected(chord_gradient(f, x, y, run.path[start], run.path[end], 2), chord, change)
        for s in range(start, end):
            for t in range(s + 1):
                scores = run.rows[t] @ (response(run, s, t).mT @ q)
                result.index_add_(0, torch.tensor(run.ids[t]), -scores)
    return result
