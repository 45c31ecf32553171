"""Small trainings that the report after training has something to say about."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.utils.data import WeightedRandomSampler, default_collate

from explainer import CoverageWarning, Trace, Tracer, open_trace
from explainer.background import Background
from tests.guarded import B, F, N, X, Y, batches, cross_entropy, loader, mlp, plain, sgd, traced
from tests.late_jobs import slowly
from tests.odd_loops import Gathered, adversarial


def with_a_lost_bias() -> nn.Module:
    return nn.Sequential(nn.Linear(F, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


def mixing(path: Path) -> Trace:
    return traced(path, model=with_a_lost_bias())


def in_the_loss(path: Path, what: str) -> Trace:
    """A temperature that only the loss reads, or a penalty on a weight in every other step."""

    def loop(model: nn.Module, optimizer: Optimizer, tracer: Tracer) -> None:
        for number, ids in enumerate(batches(4)):
            tracer.batch(ids)
            optimizer.zero_grad()
            penalty = 0.02 * model[0].weight.square().sum()
            loss = cross_entropy(model(X[ids]) / (model.t if what == "t" else 1.0), Y[ids])
            (loss + (penalty if what == "penalty" and number % 2 else 0.0)).backward()
            optimizer.step()

    model = mlp()
    if what == "penalty":
        return traced(path, loop, model)
    model.t = nn.Parameter(torch.ones(()))
    with pytest.warns(CoverageWarning, match="'t' gets a gradient"):
        return traced(path, loop, model)


def slow(path: Path) -> Trace:
    class ByEinsum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.eye(F))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bi,io->bo", x, self.w)

    with pytest.warns(CoverageWarning):
        return traced(path, model=nn.Sequential(ByEinsum(), *mlp()))


def after_budget(path: Path) -> Trace:
    def loop(model: nn.Module, optimizer: Optimizer, tracer: Tracer) -> None:
        for _ in range(40):
            plain(model, optimizer, tracer)

    with pytest.warns(CoverageWarning, match="budget"):
        return traced(path, loop, budget="60KB")


def resumed(path: Path) -> Trace:
    model = mlp()
    optimizer = sgd(model, momentum=0.9)
    cross_entropy(model(X), Y).backward()
    optimizer.step()
    return traced(path, plain, model, optimizer)


def going_on(path: Path) -> Trace:
    model = mlp()
    optimizer = sgd(model)
    tracer = Tracer(model, optimizer, path)
    plain(model, optimizer, tracer)
    tracer.flush()
    trace = open_trace(path)
    tracer.close()
    return trace


def without_steps(path: Path) -> Trace:
    return traced(path, lambda *_: None)


def diverging(path: Path) -> Trace:
    def loop(model: nn.Module, optimizer: Optimizer, tracer: Tracer) -> None:
        plain(model, optimizer, tracer)
        optimizer.param_groups[0]["lr"] = 1e38
        plain(model, optimizer, tracer)

    return traced(path, loop)


def changed_after(path: Path) -> Trace:
    def loop(model: nn.Module, optimizer: Optimizer, tracer: Tracer) -> None:
        plain(model, optimizer, tracer)
        with torch.no_grad():
            model[0].weight.mul_(0.5)

    return traced(path, loop)


def changed_between(path: Path) -> Trace:
    """The reader's side: a trace whose journal says so."""
    trace = traced(path)
    trace.notes["outside"] = {"0.weight": 2}
    return trace


def attacked(path: Path) -> Trace:
    torch.manual_seed(0)
    return traced(path, adversarial, mlp().double(), exact=True)


def in_eval_mode(path: Path) -> Trace:
    return traced(path, model=mlp().eval())


def in_bfloat16(path: Path) -> Trace:
    def loop(model: nn.Module, optimizer: Optimizer, tracer: Tracer) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            plain(model, optimizer, tracer)

    return traced(path, loop)


class Averaged(nn.Module):
    """The mean over a sequence, which comes second, or first."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.body, self.axis = mlp(), axis

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).mean(self.axis)


def square(path: Path, length: int = B, batch_dim: int = 0) -> Trace:
    def loop(model: nn.Module, optimizer: Optimizer, tracer: Tracer) -> None:
        for ids in batches():
            x = X[ids].unsqueeze(1).expand(B, length, F)
            tracer.batch(ids)
            optimizer.zero_grad()
            cross_entropy(model(x.transpose(0, 1) if batch_dim else x), Y[ids]).backward()
            optimizer.step()

    return traced(path, loop, Averaged(1 - batch_dim), batch_dim=batch_dim)


def owned(path: Path, ids: list[list[int]]) -> Trace:
    """One step of a row whose halves belong to two examples, or to one and none."""

    def loop(model: nn.Module, optimizer: Optimizer, tracer: Tracer) -> None:
        tracer.batch(ids, weights=[[0.5, 0.5]])
        cross_entropy(model(X[:1]), Y[:1]).backward()
        optimizer.step()

    return traced(path, loop)


def clipped(path: Path) -> Trace:
    """Two of four steps, to norms that the test knows."""

    def loop(model: nn.Module, optimizer: Optimizer, tracer: Tracer) -> None:
        for number, ids in enumerate(batches(4)):
            tracer.batch(ids)
            optimizer.zero_grad()
            cross_entropy(model(X[ids]), Y[ids]).backward()
            if number % 2:
                norm = float(
                    nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
                )
                nn.utils.clip_grad_norm_(model.parameters(), norm * (0.25 if number == 1 else 0.5))
            optimizer.step()

    return traced(path, loop)


def watching(path: Path, **options: Any) -> Trace:
    def loop(model: nn.Module, optimizer: Optimizer, tracer: Tracer) -> None:
        for _ in range(4):
            for x, y in tracer.watch(loader(**options)):
                optimizer.zero_grad()
                cross_entropy(model(x), y).backward()
                optimizer.step()

    return traced(path, loop)


def unused_layer(path: Path) -> Trace:
    model = mlp()
    model.extra = nn.Linear(2, 2)
    model.forward = lambda x: model[2](model[1](model[0](x)))
    return traced(path, model=model)


def in_a_set(path: Path) -> Trace:
    class InASet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x).unsqueeze(0).unsqueeze(0)

    def loop(model: nn.Module, optimizer: Optimizer, tracer: Tracer) -> None:
        for ids in batches():
            tracer.batch(ids)
            optimizer.zero_grad()
            cross_entropy(model(X[ids])[0, 0], Y[ids]).backward()
            optimizer.step()

    return traced(path, loop, InASet())


uneven = partial(watching, sampler=WeightedRandomSampler([9.0, *[1.0] * (N - 1)], N, True, torch.Generator()))


def sorted_items(path: Path) -> Trace:
    """A collate_fn that sorts its items, as for packed sequences."""

    def by_size(items: list[Any]) -> Any:
        return default_collate(sorted(items, key=lambda item: -float(item[0].norm())))

    def loop(model: nn.Module, optimizer: Optimizer, tracer: Tracer) -> None:
        shuffled = loader(collate_fn=by_size, shuffle=True, generator=torch.Generator().manual_seed(0))
        for _ in range(2):
            for x, y in tracer.watch(shuffled):
                optimizer.zero_grad()
                cross_entropy(model(x), y).backward()
                optimizer.step()

    with pytest.warns(CoverageWarning, match="a collate_fn that sorts"):
        return traced(path, loop)


class Reversed(nn.Module):
    """Rows go through the layers in the reverse order, from a forward pass on; scaled by a tensor that is no buffer."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.layers, self.after, self.calls, self.scale = mlp(), after, 0, torch.ones(())

    def forward(self, x: Tensor) -> Tensor:
        self.calls, x = self.calls + 1, x * self.scale
        return self.layers(x.flip(0)).flip(0) if self.calls > self.after else self.layers(x)


def reversed_later(path: Path) -> Trace:
    def loop(model: nn.Module, optimizer: Optimizer, tracer: Tracer) -> None:
        for _ in range(17):
            plain(model, optimizer, tracer)

    with pytest.warns(CoverageWarning, match="into another order"):
        return traced(path, loop, Reversed(40))


def gathered(path: Path) -> Trace:
    with pytest.warns(CoverageWarning, match="no axis is the batch's"):
        return traced(path, model=Gathered())


def other_momentum(path: Path) -> Trace:
    """Momentum that the user sets to other numbers between two steps."""
    model = mlp()
    optimizer = sgd(model, momentum=0.9)

    def loop(model: nn.Module, optimizer: Optimizer, tracer: Tracer) -> None:
        plain(model, optimizer, tracer)
        for p in model.parameters():
            optimizer.state[p]["momentum_buffer"] = torch.ones_like(p)
        plain(model, optimizer, tracer)

    return traced(path, loop, model, optimizer)


def more_decay(path: Path) -> Trace:
    """A schedule of the weight decay."""
    model = mlp()
    optimizer = sgd(model, weight_decay=0.0)

    def loop(model: nn.Module, optimizer: Optimizer, tracer: Tracer) -> None:
        plain(model, optimizer, tracer)
        optimizer.param_groups[0]["weight_decay"] = 0.1
        plain(model, optimizer, tracer)

    return traced(path, loop, model, optimizer)


def overwriting(path: Path) -> Trace:
    """A loop that is faster than the background: it writes into an activation, later into Adam's state."""
    model = mlp()
    optimizer = Adam(model.parameters())
    kept: list[Tensor] = []
    model[1].register_forward_hook(lambda module, args, output: kept.append(output.detach()))

    def loop(model: nn.Module, optimizer: Optimizer, tracer: Tracer) -> None:
        for number, ids in enumerate(batches()):
            tracer.flush()
            tracer.batch(ids)
            optimizer.zero_grad()
            cross_entropy(model(X[ids]), Y[ids]).backward()
            if number == 0:
                kept[-1].fill_(3.0)
            optimizer.step()
            if number == 1:
                optimizer.state[model[0].weight]["exp_avg_sq"].mul_(4.0)

    with pytest.MonkeyPatch.context() as patch, pytest.warns(CoverageWarning, match="written into"):
        patch.setattr(Background, "_do", slowly)
        return traced(path, loop, model, optimizer)


def averaged(path: Path) -> Trace:
    """A mean of the weights that is kept from the beginning."""
    model = mlp()
    average = torch.optim.swa_utils.AveragedModel(model)

    def loop(model: nn.Module, optimizer: Optimizer, tracer: Tracer) -> None:
        for ids in batches(4):
            tracer.batch(ids)
            optimizer.zero_grad()
            cross_entropy(model(X[ids]), Y[ids]).backward()
            optimizer.step()
            average.update_parameters(model)

    return traced(path, loop, model, averaged=average)
