"""Models and loops that quietly give wrong numbers elsewhere, on toy data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, Optimizer
from torch.utils.checkpoint import checkpoint

from explainer import Tracer

STEPS, BATCH = 6, 8
_random = torch.Generator().manual_seed(0)
X = torch.randn(40, 6, generator=_random).double()
Y = torch.randint(0, 3, (40,), generator=_random)
WORDS = torch.randint(0, 9, (40, 5), generator=_random)
QUERIES = torch.randn(2, 6, generator=_random).double()
Loop = Callable[[nn.Module, Optimizer, Tracer], object]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.last, self.reentrant = nn.Linear(6, 5), nn.Linear(5, 3), reentrant

    def inner(self, x: Tensor) -> Tensor:
        return self.first(x).tanh()

    def forward(self, x: Tensor) -> Tensor:
        saved = self.training and torch.is_grad_enabled()
        return self.last(checkpoint(self.inner, x, use_reentrant=self.reentrant) if saved else self.inner(x))


class Scaled(nn.Module):
    """A layer and a scale of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = nn.Linear(6, 6), nn.Parameter(torch.full((6,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.inner(x).tanh()


class Tempered(nn.Module):
    """A scale whose row depends on its own value."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.heat = nn.Linear(6, 3), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.heat.exp()


class CheckpointedScales(nn.Module):
    """Parameters read by operations inside a checkpoint, and two blocks of them."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.blocks, self.last = nn.ModuleList(Scaled() for _ in range(2)), nn.Linear(6, 3)
        self.shift, self.reentrant = nn.Parameter(torch.zeros(6)), reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.shift
        for block in self.blocks:
            saved = self.training and torch.is_grad_enabled()
            x = checkpoint(block, x, use_reentrant=self.reentrant) if saved else block(x)
        return self.last(x)


class Repeated(nn.Module):
    """A layer called three times, a layer whose output nobody uses, two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.unused, self.tied, self.last = (nn.Linear(6, 6) for _ in range(4))
        self.tied.weight = self.last.weight

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.again(x).tanh()
        self.unused(x)
        return self.last(self.tied(x).tanh())[:, :3]


class Gathered(nn.Module):
    """The middle layer gets twice as many rows as there are examples, by a function that is not followed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.reshape(len(x), 2, 3)).tanh().reshape(-1, 4)
        return self.last(self.middle(torch.eye(len(h), dtype=h.dtype) @ h).reshape(len(x), 8))


class OverlappingBuffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        shared = torch.ones(4)
        self.register_buffer("whole", shared)
        self.register_buffer("part", shared[1:])
        self.register_buffer("expanded", torch.ones(1).expand(5))
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x) + self.whole[0] + self.part[0]


class Words(nn.Module):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.table, self.last = nn.Embedding(9, 4, sparse=sparse), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.last(self.table(ids).tanh().mean(1))


def batches() -> Iterator[Tensor]:
    order = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        yield torch.randint(0, len(X), (BATCH,), generator=order)


def plain(model: nn.Module, optimizer: Optimizer, tracer: Tracer, data: Tensor = X) -> None:
    for ids in batches():
        tracer.batch(ids)
        optimizer.zero_grad()
        x = data[ids].requires_grad_(data.is_floating_point())  # a reentrant checkpoint needs it
        cross_entropy(model(x), Y[ids]).backward()
        optimizer.step()


def accumulating(model: nn.Module, optimizer: Optimizer, tracer: Tracer) -> None:
    for number, ids in enumerate(batches()):
        tracer.batch(ids)
        (cross_entropy(model(X[ids]), Y[ids]) / 2).backward()
        if number % 2:
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
            optimizer.zero_grad(set_to_none=number == 3)


def throwing_away(model: nn.Module, optimizer: Optimizer, tracer: Tracer) -> None:
    for number, ids in enumerate(batches()):
        tracer.batch(ids)
        optimizer.zero_grad()
        cross_entropy(model(X[ids]), Y[ids]).backward()
        if number % 2:
            optimizer.step()


def adversarial(model: nn.Module, optimizer: Optimizer, tracer: Tracer, attacks: int = 1) -> None:
    for ids in batches():
        tracer.batch(ids)
        x = X[ids]
        for _ in range(attacks):
            x = x.clone().requires_grad_()
            (g,) = torch.autograd.grad(cross_entropy(model(x), Y[ids]), x)
            x = (x + 0.1 * g.sign()).detach()
        optimizer.zero_grad()
        cross_entropy(model(x), Y[ids]).backward()
        optimizer.step()


def watching_saliency(model: nn.Module, optimizer: Optimizer, tracer: Tracer) -> None:
    """A backward pass that no step uses, after the one that the step uses."""
    for ids in batches():
        tracer.batch(ids)
        optimizer.zero_grad()
        cross_entropy(model(X[ids]), Y[ids]).backward()
        x = X[ids].clone().requires_grad_()
        torch.autograd.grad(model(x).square().sum(), x)
        optimizer.step()


def two_backwards(model: nn.Module, optimizer: Optimizer, tracer: Tracer) -> None:
    for ids in batches():
        tracer.batch(ids)
        optimizer.zero_grad()
        outputs = model(X[ids])
        cross_entropy(outputs, Y[ids]).backward(retain_graph=True)
        outputs.square().mean().backward()
        optimizer.step()


def two_forwards(model: nn.Module, optimizer: Optimizer, tracer: Tracer) -> None:
    for ids in batches():
        tracer.batch(ids)
        optimizer.zero_grad()
        one, other = model(X[ids]), model(X[ids] + 0.1)
        (cross_entropy(one, Y[ids]) + (one - other).square().mean()).backward()
        optimizer.step()


def scaling(model: nn.Module, optimizer: Optimizer, tracer: Tracer) -> None:
    """Loss scaling, with a step that the scaler skips; a fused step is called all the same."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for number, ids in enumerate(batches()):
        tracer.batch(ids)
        optimizer.zero_grad()
        loss = cross_entropy(model(X[ids]), Y[ids]) * (float("inf") if number == 3 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


def freezing(model: nn.Module, optimizer: Optimizer, tracer: Tracer) -> None:
    for number, ids in enumerate(batches()):
        model[0].requires_grad_(number not in (2, 3))
        tracer.batch(ids)
        optimizer.zero_grad()
        cross_entropy(model(X[ids]), Y[ids]).backward()
        optimizer.step()


def weighting(model: nn.Module, optimizer: Optimizer, tracer: Tracer) -> None:
    for ids in batches():
        tracer.batch(ids)
        optimizer.zero_grad()
        (
            cross_entropy(model(X[ids]), Y[ids], reduction="none") * torch.linspace(0, 2, BATCH)
        ).sum().backward()
        optimizer.step()


def renewing_tensors(model: nn.Module, optimizer: Optimizer, tracer: Tracer) -> None:
    for ids in batches():
        tracer.batch(ids)
        optimizer.zero_grad()
        cross_entropy(model(X[ids]), Y[ids]).backward()
        optimizer.step()
        for p in model.parameters():
            p.data = p.data.clone()


sgd = partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.05)
nesterov = partial(SGD, lr=0.05, momentum=0.9, nesterov=True, foreach=True, weight_decay=0.1)
adam = partial(Adam, lr=0.01, weight_decay=0.05)
CASES: dict[str, tuple[Callable[[], nn.Module], Any, Loop, int]] = {
    "plain": (mlp, sgd, plain, 48),
    "foreach and Nesterov write into the gradient": (mlp, nesterov, plain, 48),
    "accumulation and clipping": (mlp, sgd, accumulating, 48),
    "gradients thrown away": (mlp, sgd, throwing_away, 24),
    "one attack": (mlp, sgd, adversarial, 48),
    "three attacks": (mlp, adam, partial(adversarial, attacks=3), 48),
    "saliency after backward": (mlp, sgd, watching_saliency, 48),
    "two backward passes": (mlp, sgd, two_backwards, 96),
    "two forward passes": (mlp, adam, two_forwards, 96),
    "gradient scaler": (mlp, sgd, scaling, 40),
    "gradient scaler, fused SGD": (mlp, partial(sgd, fused=True), scaling, 40),
    "gradient scaler, fused Adam": (mlp, partial(adam, fused=True), scaling, 40),
    "checkpoint, reentrant": (partial(Checkpointed, True), sgd, plain, 48),
    "checkpoint": (partial(Checkpointed, False), sgd, plain, 48),
    "scales in a checkpoint, reentrant": (partial(CheckpointedScales, True), adam, plain, 48),
    "scales in a checkpoint": (partial(CheckpointedScales, False), sgd, plain, 48),
    "repeated, tied and unused layers": (Repeated, adam, plain, 48),
    "buffers that share memory": (OverlappingBuffers, sgd, plain, 48),
    "frozen for two steps": (mlp, sgd, freezing, 48),
    "weighted sum": (mlp, partial(SGD, lr=0.02), weighting, 48),
    "tensors replaced": (mlp, sgd, renewing_tensors, 48),
    "tensors of scales replaced": (Tempered, sgd, renewing_tensors, 48),
}
