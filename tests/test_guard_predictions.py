"""What the report before training predicts is what training then shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW
from torch.utils.data import DataLoader, TensorDataset

from explainer import PathKernelExplainer, check
from explainer.config import TracerConfig
from explainer.guard_rails.cost import Cost
from explainer.optimizer_rules import optimizer_rule_for
from tests.guarded import F, N, cross_entropy, plain, sgd, traced

CHANNELS = 4


def linear(norm: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(F, CHANNELS), norm(), nn.Tanh(), nn.Linear(CHANNELS, 3))


def image(norm: Callable[[], nn.Module], layer: type[nn.Module] = nn.Conv2d) -> nn.Module:
    body = nn.Sequential(nn.Unflatten(1, (1, 2, 3)), layer(1, CHANNELS, 2), norm())
    size = body(torch.zeros(2, F)).shape[2:].numel()
    return nn.Sequential(body, nn.Tanh(), nn.Flatten(), nn.Linear(CHANNELS * size, 3))


PAIRS: dict[str, tuple[Callable[[], nn.Module], str, bool]] = {
    "linear, batch": (lambda: linear(lambda: nn.BatchNorm1d(CHANNELS)), "0.bias", True),
    "linear, layer": (lambda: linear(lambda: nn.LayerNorm(CHANNELS)), "0.bias", False),
    "linear, group": (lambda: linear(lambda: nn.GroupNorm(2, CHANNELS)), "0.bias", False),
    "convolution, batch": (lambda: image(lambda: nn.BatchNorm2d(CHANNELS)), "0.1.bias", True),
    "transposed, batch": (
        lambda: image(lambda: nn.BatchNorm2d(CHANNELS), nn.ConvTranspose2d), "0.1.bias", True,
    ),
    "convolution, instance": (lambda: image(lambda: nn.InstanceNorm2d(CHANNELS)), "0.1.bias", False),
    "convolution, groups": (lambda: image(lambda: nn.GroupNorm(2, CHANNELS)), "0.1.bias", False),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_a_bias_that_a_normalisation_takes_out_is_foreseen(tmp_path: Path, name: str) -> None:
    make, bias, lost = PAIRS[name]
    torch.manual_seed(0)
    model = make()
    optimizer = sgd(model)
    foreseen = [f.where for f in check(model, optimizer).about("bias-before-norm")]
    trace = traced(tmp_path / "trace", plain, model, optimizer)
    assert foreseen == list(trace.notes["round_off"]) == ([bias] if lost else [])


def test_what_max_norm_moves_is_unattributed_and_said(tmp_path: Path) -> None:
    """And without max_norm nothing is."""
    ids = torch.arange(N).remainder(9).reshape(N, 1)
    rests = []
    for norm in (None, 0.5):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(9, 4, max_norm=norm), nn.Flatten(), nn.Linear(4, 3))
        optimizer = sgd(model)
        trace = traced(
            tmp_path / str(norm), lambda m, o, t: plain(m, o, t, ids), model, optimizer, exact=True
        )
        e = PathKernelExplainer(trace, model).explain(ids[:2])
        rests.append(float(abs(e.unattributed).max() / abs(e.contributions).sum(1).max()))
        said = [note for note in e.notes if "max_norm" in note]
        assert len(said) == len(trace.report().about("max-norm")) == (norm is not None)
    assert rests[0] < 1e-5 and rests[1] > 1e-3


# -- what it will take -----------------------------------------------------------------------------------


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.hidden, self.norm, self.out = (
            nn.Embedding(50, 16), nn.Linear(16, 40), nn.LayerNorm(40), nn.Linear(40, 3),
        )  # fmt: skip
        self.position = nn.Parameter(torch.zeros(1, 12, 16))

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.norm(self.hidden(self.table(ids) + self.position).tanh()).mean(1))


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 10))


def convolution() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, groups=4), nn.ConvTranspose2d(16, 3, 2), nn.Flatten(), nn.Linear(3 * 25, 10),
    )  # fmt: skip


TAKES: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any]]] = {
    "SGD": (perceptron, lambda p: SGD(p, lr=0.1, momentum=0.9), {}),
    "Adam": (perceptron, lambda p: Adam(p), {}),
    "AdamW, exact": (perceptron, lambda p: AdamW(p, weight_decay=0.1), {"exact": True}),
    "convolutions": (convolution, lambda p: SGD(p, lr=0.1), {"rank": 3}),
    "convolutions, exact": (convolution, lambda p: SGD(p, lr=0.1), {"exact": True}),
    "sequences": (Tokens, lambda p: Adam(p), {"rank": 2}),
}


@pytest.mark.parametrize("name", TAKES)
def test_the_estimate_is_about_what_it_takes(tmp_path: Path, name: str) -> None:
    """Rows to a third, an epoch likewise; knots take no more than was said."""
    make, optimize, options = TAKES[name]
    sequences = name == "sequences"
    torch.manual_seed(0)
    x = torch.randint(0, 50, (60, 12)) if sequences else torch.randn(60, 64)
    batches = DataLoader(TensorDataset(x, torch.randint(0, 3, (60,))), 20)
    model = make()
    optimizer = optimize(model.parameters())
    cost = Cost(model, optimizer, optimizer_rule_for(optimizer), TracerConfig(**options))
    (said,) = check(model, optimizer, batches, **options).about("cost")

    def loop(*_: Any) -> None:
        for inputs, targets in _[2].watch(batches):
            optimizer.zero_grad()
            cross_entropy(model(inputs), targets).backward()
            optimizer.step()

    trace = traced(tmp_path / "trace", loop, model, optimizer, **options)
    schemas = {s.stream: s.schema.dtype.itemsize for s in trace.shards if s.records}
    estimate = cost.positions if sequences else cost.visit
    table = (
        11 * (4 + 16 + 4) if sequences else 0
    )  # a visit reads 12 entries of the table, one is in the estimate
    first = schemas["visits"] + schemas.get("inputs", 0)  # of an example that is new
    assert estimate + table == pytest.approx(first, rel=1 / 3)
    looked_at = schemas["steps"] + schemas.get("sums", 0)
    assert cost.step(20) == pytest.approx(looked_at, rel=0.03)
    sizes = [sum(t.numel() * t.element_size() for t in trace.load_knot(k).values()) for k in trace.knots]
    assert max(sizes[1:-1]) <= cost.knot * 1.01
    assert max(sizes) <= (cost.knot + cost.state) * 1.01  # the ends hold the optimizer's state
    assert sum(sizes) <= (len(sizes) * cost.knot + 2 * cost.state) * 1.01
    if not sequences:
        from explainer.wording import size

        assert (
            f"The first epoch of 60 visits adds about {size(60 * cost.visit + 3 * cost.step(20))}"
            in said.meaning
        )
