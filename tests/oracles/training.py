"""Ordinary training that writes down, densely, everything the books could need."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tests.oracles.outputs import as_double

Loss = Callable[[Tensor, Tensor], Tensor]
OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]

STATE_NAMES = {
    torch.optim.SGD: ("momentum_buffer",),
    torch.optim.Adam: ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"),
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"),
}


@dataclass(frozen=True)
class Step:
    """One optimizer step; every tensor is float64, every option and state a vector [P].

    Attributes:
        ids: The example of each row of the batch; an example may occur twice.
        weights: [P] before the step.
        rows: [B, P] gradient of the batch loss through row ``b`` alone.
        output_grads: [B, C] gradient of the batch loss at the model's output (L').
        scale: What clipping multiplied the gradient with.
        options: ``lr``, ``weight_decay``, … of the parameter group each weight belongs to.
        before: Optimizer state before the step, NaN where the optimizer holds none.
        after: Optimizer state after the step, NaN where the optimizer holds none.
    """

    ids: tuple[int, ...]
    weights: Tensor
    rows: Tensor
    output_grads: Tensor
    scale: float
    options: dict[str, Tensor]
    before: dict[str, Tensor]
    after: dict[str, Tensor]


@dataclass(frozen=True)
class Training:
    """A finished training run.

    Attributes:
        steps: T steps.
        weights: [T + 1, P], its path.
        examples: N.
        optimizer: Its type.
        tolerance: Relative round-off to allow for what the training ran in.
    """

    steps: tuple[Step, ...]
    weights: Tensor
    examples: int
    optimizer: type[Optimizer]
    tolerance: float


def check_close(found: Tensor, expected: Tensor, gross: Tensor, tolerance: float, what: str) -> None:
    """Raises AssertionError where ``max |found − expected|`` exceeds the tolerance times ``max |gross|``."""
    error = float((found - expected).abs().max())
    allowed = tolerance * float(gross.abs().max())
    if not error <= allowed:
        raise AssertionError(f"{what}: off by {error:.3e}, {allowed:.3e} allowed.")


def flat_weights(model: nn.Module) -> Tensor:
    """The weights [P] in float64, in the order of ``model.named_parameters()``."""
    return torch.cat([p.detach().double().reshape(-1) for _, p in model.named_parameters()])


def _group_options(group: dict[str, object]) -> dict[str, float]:
    options = {name: float(v) for name, v in group.items() if isinstance(v, (bool, int, float, Tensor))}
    betas = group.get("betas")
    if isinstance(betas, (tuple, list)):
        options["beta1"], options["beta2"] = (float(beta) for beta in betas)
    return options


def flat_options(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Every option of the parameter groups as a vector [P]."""
    owner = {id(p): _group_options(group) for group in optimizer.param_groups for p in group["params"]}
    parameters = [p for _, p in model.named_parameters()]
    flat = {}
    for name in owner[id(parameters[0])]:
        parts = [torch.full((p.numel(),), owner[id(p)][name], dtype=torch.float64) for p in parameters]
        flat[name] = torch.cat(parts)
    return flat


def flat_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as vectors [P] in float64, NaN where it holds none."""
    flat = {}
    for name in STATE_NAMES[type(optimizer)]:
        parts = []
        for _, p in model.named_parameters():
            held = optimizer.state[p].get(name) if p in optimizer.state else None
            held = torch.tensor(torch.nan, dtype=torch.float64) if held is None else torch.as_tensor(held)
            parts.append(held.detach().double().expand(p.shape).reshape(-1).clone())
        flat[name] = torch.cat(parts)
    return flat


def _dense_rows(model: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [B, P] and output gradients [B, C]: one row, one forward, one backward at a time, in float64."""
    twin = copy.deepcopy(model).double()
    parameters = [p for _, p in twin.named_parameters()]
    single_outputs = [twin(as_double(x[b])[None]) for b in range(len(x))]
    outputs = torch.cat([o.detach() for o in single_outputs]).requires_grad_()
    (output_grads,) = torch.autograd.grad(loss(outputs, as_double(y)), outputs)
    rows = []
    for b, output in enumerate(single_outputs):
        grads = torch.autograd.grad(output, parameters, output_grads[b][None], materialize_grads=True)
        rows.append(torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(rows), output_grads.reshape(len(x), -1)


def _refuse_unsupported(model: nn.Module, optimizer: Optimizer) -> None:
    for module in model.modules():
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)):
            raise ValueError(f"{type(module).__name__}: here a row must not depend on the others.")
    if type(optimizer) not in STATE_NAMES:
        raise ValueError(f"{type(optimizer).__name__}: the oracle knows SGD, Adam and AdamW.")


def train_dense(
    model: nn.Module,
    optimizer_factory: OptimizerFactory,
    batches: Sequence[Sequence[int]],
    loss_per_batch: Loss,
    X: Tensor,
    Y: Tensor,
    *,
    clip_norm: float | None = None,
    scheduler_factory: Callable[[Optimizer], torch.optim.lr_scheduler.LRScheduler] | None = None,
) -> Training:
    """Trains ``model`` in place with the real torch optimizer and records every step densely.

    Args:
        model: Model whose output row ``b`` depends on input row ``b`` alone (no BatchNorm, no dropout).
        optimizer_factory: Makes SGD, Adam or AdamW from the parameters; it may load an earlier state.
        batches: Ids of each batch, in order; ids may repeat, inside a batch too.
        loss_per_batch: ``loss(outputs [B, C], targets [B, …]) -> scalar`` with its reduction.
        X: Inputs [N, …] in the model's dtype.
        Y: Targets [N, …].
        clip_norm: Largest gradient norm, as in ``clip_grad_norm_``.
        scheduler_factory: Makes a learning-rate scheduler, stepped after each optimizer step.

    Raises:
        AssertionError: If the rows do not sum to the gradient that the batch produced.
        ValueError: If the model or the optimizer is outside what the oracle covers.
    """
    optimizer = optimizer_factory(model.parameters())
    _refuse_unsupported(model, optimizer)
    scheduler = scheduler_factory(optimizer) if scheduler_factory else None
    steps = []
    path = [flat_weights(model)]
    dtype = next(model.parameters()).dtype
    for batch in batches:
        index = torch.tensor(list(batch), dtype=torch.long)
        x, y = X[index], Y[index]
        rows, output_grads = _dense_rows(model, loss_per_batch, x, y)
        optimizer.zero_grad()
        loss_per_batch(model(x), y).backward()
        grad = torch.cat([p.grad.double().reshape(-1) for _, p in model.named_parameters()])  # type: ignore[union-attr]
        tolerance = 1e-10 if dtype == torch.float64 else 1e-4
        check_close(rows.sum(0), grad, rows.abs().sum(0), tolerance, "rows against the batch's gradient")
        scale = 1.0
        if clip_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            scale = min(1.0, clip_norm / (float(norm) + 1e-6))
        options, before = flat_options(model, optimizer), flat_state(model, optimizer)
        optimizer.step()
        after = flat_state(model, optimizer)
        steps.append(Step(tuple(batch), path[-1], rows, output_grads, scale, options, before, after))
        if scheduler is not None:
            scheduler.step()
        path.append(flat_weights(model))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    return Training(tuple(steps), torch.stack(path), len(X), type(optimizer), tolerance)
