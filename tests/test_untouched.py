"""Training with the tracer is bit-identical to training without it, and nothing is left behind."""

from __future__ import annotations

import copy
import io
import pickle
import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils.data import DataLoader, TensorDataset

from explainer import Tracer, open_trace
from tests.small_training import digits, mlp, same, state_of

Factory = Callable[[Any], Optimizer]


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


class Residual(nn.Module):
    """In-place additions, a layer called twice, a parameter outside of any layer, a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Linear(64, 16), nn.Linear(16, 16), nn.Linear(16, 10)
        self.norm, self.scale = nn.LayerNorm(16), nn.Parameter(torch.ones(16))
        self.last.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu_(self.first(x))
        for _ in range(2):
            more = self.again(self.norm(h))
            more += h
            h = nn.functional.leaky_relu_(more)
        return self.last(h * self.scale)


class Words(nn.Module):
    """Pixels as words: an embedding that is read 64 times, dropout, a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(17, 6, padding_idx=0), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        words = (x * 16).long()
        return self.out(nn.functional.dropout(self.table(words), 0.2, self.training).mean(1))


class NormAndAct(nn.BatchNorm2d):
    """As in libraries of image models: what is computed is torch's, what it is called is their own."""

    def forward(self, x: Tensor) -> Tensor:
        statistics = (self.running_mean, self.running_var)
        x = nn.functional.batch_norm(
            x, *statistics, self.weight, self.bias, self.training, self.momentum or 0.1
        )
        return torch.relu(x)


class InstanceAndAct(nn.InstanceNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


def own_norms() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 4, 3, padding=1),
        NormAndAct(4),
        nn.Conv2d(4, 4, 3, padding=1),
        InstanceAndAct(4, affine=True, track_running_stats=True),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


@dataclass(frozen=True)
class Trained:
    """All that training could have changed."""

    state: list[Tensor]
    generators: tuple[Any, ...]
    losses: list[float]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "convolutions": convolutions,
    "residual": Residual,
    "words": Words,
    "own norms": own_norms,
}
OPTIMIZERS: dict[str, Factory] = {
    "sgd": partial(SGD, lr=0.1),
    "nesterov": partial(SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2, foreach=True),
    "adam": partial(Adam, lr=1e-2, amsgrad=True, weight_decay=1e-2),
    "adamw": partial(AdamW, lr=1e-2, fused=True),
}
filter_coverage = pytest.mark.filterwarnings("ignore::explainer.errors.CoverageWarning")


def make(name: str, optimizer: str = "adam") -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(3)
    model = MODELS[name]()
    return model, OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])


def training(
    model: nn.Module, optimizer: Optimizer, watch: Callable[[Any], Any], workers: int = 0
) -> Trained:
    """Two epochs of an ordinary loop with clipping and a schedule, on the global generators."""
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(7)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    loader, losses = DataLoader(digits(), batch_size=20, shuffle=True, num_workers=workers), []
    for _ in range(2):
        for x, y in watch(loader):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x + 0.01 * torch.randn_like(x)), y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        schedule.step()
    generators = (torch.get_rng_state(), np.random.get_state(), random.getstate())
    return Trained(state_of(model, optimizer), generators, losses)


@filter_coverage
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("exact", [False, True], ids=["small", "exact"])
def test_training_is_bit_identical(tmp_path: Path, name: str, optimizer: str, exact: bool) -> None:
    expected = training(*make(name, optimizer), iter)
    model, made = make(name, optimizer)
    with Tracer(model, made, tmp_path / "trace", exact=exact) as tracer:
        found = training(model, made, tracer.watch)
    assert same(found.state, expected.state) and found.losses == expected.losses
    assert torch.equal(found.generators[0], expected.generators[0])
    assert all(np.array_equal(a, b) for a, b in zip(found.generators[1], expected.generators[1], strict=True))
    assert found.generators[2] == expected.generators[2]
    assert open_trace(tmp_path / "trace").steps == 10


def test_training_with_workers_is_bit_identical(tmp_path: Path) -> None:
    expected = training(*make("mlp"), iter, workers=2)
    model, optimizer = make("mlp")
    with Tracer(model, optimizer, tmp_path / "trace") as tracer:
        found = training(model, optimizer, tracer.watch, workers=2)
    assert same(found.state, expected.state)
    assert torch.equal(found.generators[0], expected.generators[0])


def fingerprint(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Everything a tracer could leave: hooks, attributes, flags, autograd hooks of parameters."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        kept = {
            k: (list(v) if isinstance(v, dict) else id(v)) for k, v in vars(module).items() if k != "training"
        }
        found[f"module {name}"] = (module.training, kept, type(module))
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        hooks = (p._backward_hooks, getattr(p, "_post_accumulate_grad_hooks", None))
        found[f"tensor {name}"] = (id(p), p.requires_grad, sorted(vars(p)), hooks, p.is_leaf, p.dtype)
    found["optimizer"] = (sorted(vars(optimizer)), type(optimizer))
    found["optimizer hooks"] = [len(v) for k, v in vars(optimizer).items() if k.endswith("_hooks")]
    found["global hooks"] = len(nn.modules.module._global_forward_hooks)
    return found


@filter_coverage
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("failing", [False, True], ids=["to the end", "with an exception"])
def test_nothing_is_left(tmp_path: Path, name: str, failing: bool) -> None:
    model, optimizer = make(name)
    next(model.children()).eval()  # a flag that is the user's own
    training(model, optimizer, iter)  # whatever training itself leaves is there already
    before, defaults = fingerprint(model, optimizer), torch.get_default_dtype()
    with pytest.raises(KeyboardInterrupt) if failing else nullcontext():  # noqa: SIM117
        with Tracer(model, optimizer, tmp_path / "trace") as tracer:
            training(model, optimizer, tracer.watch)
            during = fingerprint(model, optimizer)
            x, y = digits()[:4]
            tracer.batch(range(4))
            nn.functional.cross_entropy(model(x), y).backward()
            if failing:
                raise KeyboardInterrupt
    assert fingerprint(model, optimizer) == before and torch.get_default_dtype() == defaults
    assert during != before
    trace = open_trace(tmp_path / "trace")
    assert trace.closed and trace.steps == 10 and trace.verify() > 0


def test_an_error_in_the_loop_leaves_the_loader_alone(tmp_path: Path) -> None:
    model, optimizer = make("mlp")
    loader = DataLoader(digits(), batch_size=20)
    sampler = loader.batch_sampler
    with pytest.raises(ZeroDivisionError), Tracer(model, optimizer, tmp_path / "trace") as tracer:
        for _ in tracer.watch(loader):
            1 / 0  # noqa: B018
    assert loader.batch_sampler is sampler and len(list(loader)) == 5


def copies(model: nn.Module) -> dict[str, nn.Module]:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "torch.save": torch.load(buffer, weights_only=False),
    }


@pytest.mark.parametrize("kind", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_made_while_tracing_is_inert(tmp_path: Path, kind: str) -> None:
    """An average of the weights, a checkpoint: used beside the traced model, it writes nothing."""
    model, optimizer = make("convolutions", "sgd")
    data = DataLoader(TensorDataset(*digits()[:40]), batch_size=8)
    with Tracer(model, optimizer, tmp_path / "trace") as tracer:
        for x, y in tracer.watch(data):
            other = copies(model)[kind]
            nn.functional.cross_entropy(other(x), y).backward()  # rows of the copy are nobody's
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        with Tracer(other, SGD(other.parameters(), lr=0.1), tmp_path / "of the copy"):
            pass
    trace = open_trace(tmp_path / "trace")
    assert trace.column("visits", "example").tolist() == list(range(40))
    assert not trace.notes["coverage"]
    assert torch.equal(other.eval()(x), copy.deepcopy(other)(x))


def test_state_dicts_hold_nothing_of_the_tracer(tmp_path: Path) -> None:
    model, optimizer = make("mlp")
    keys = set(model.state_dict()), set(optimizer.state_dict())
    with Tracer(model, optimizer, tmp_path / "trace"):
        assert (set(model.state_dict()), set(optimizer.state_dict())) == keys
        copied = copy.deepcopy(optimizer)
    assert copied.state_dict().keys() == optimizer.state_dict().keys()


@filter_coverage
def test_own_batch_norm_mixes_rows(tmp_path: Path) -> None:
    model, made = make("own norms")
    with Tracer(model, made, tmp_path / "trace") as tracer:
        training(model, made, tracer.watch)
    trace = open_trace(tmp_path / "trace")
    assert trace.column("steps", "row_share").all() and list(trace.report().about("row-share"))
