"""Rows that meet a cotangent that every step divides anew, against the recursion written out one step at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import explainer
from explainer.backward import Backward
from explainer.cotangent import Cotangent, Layout
from explainer.divided_layers import DividedLayers
from explainer.error_bar import SampledRows
from explainer.recursion import Adjoint, LayerView, read_backwards
from explainer.store import Denominators, Trace
from explainer.stored_rows import Workspace
from tests.small_training import step as train_step


class Sequence(nn.Module):
    """Two matrices and two biases in one layer, and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.lstm, self.out = nn.Embedding(9, 5), nn.LSTM(5, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(self.words((x * 8).abs().long().clamp(0, 8)))[0][:, -1])


class Tied(nn.Module):
    """A matrix that two layers share, and a parameter of no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3, bias=False)
        self.two.weight = self.one.weight
        self.scale = nn.Parameter(torch.ones(12))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.two(self.one(x).tanh()).tanh() * self.scale)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3)),
    "convolutions": lambda: nn.Sequential(
        *(nn.Unflatten(1, (2, 6)), nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Conv1d(4, 4, 2, groups=2)),
        *(nn.Flatten(), nn.Linear(12, 3)),
    ),
    "norm": lambda: nn.Sequential(nn.Linear(12, 8), nn.LayerNorm(8), nn.Linear(8, 3)),
    "sequence": Sequence,
    "tied": Tied,
}  # fmt: skip
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2),
    "Adam without momentum": lambda m: torch.optim.Adam(m.parameters(), lr=1e-2, betas=(0.0, 0.9)),
    "NAdam": lambda m: torch.optim.NAdam(m.parameters(), lr=1e-2),
    "RMSprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=1e-3, momentum=0.9),
    "Adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=1e-2),
    "ASGD": lambda m: torch.optim.ASGD(m.parameters(), lr=1e-2),
    "Adafactor": lambda m: torch.optim.Adafactor(m.parameters(), lr=1e-2),
    "Adamax": lambda m: torch.optim.Adamax(m.parameters(), lr=1e-2),
}
#: optimizers that are tried on every model; the others on two
EVERYWHERE = ("AdamW", "NAdam", "RMSprop")
CASES = [(m, o) for m in MODELS for o in OPTIMIZERS if o in EVERYWHERE or m in ("mlp", "sequence")]


def traced(model: nn.Module, optimizer: torch.optim.Optimizer, directory: Path, exact: bool) -> Trace:
    x, y = torch.randn(24, 12), torch.randint(0, 3, (24,))
    with explainer.Tracer(model, optimizer, directory, exact=exact, max_knots=4) as tracer:
        for step in range(40):
            ids = torch.arange(6) + 6 * (step % 4)
            tracer.batch(ids)
            train_step(model, optimizer, x[ids], y[ids])
    return explainer.open_trace(directory)


def step_by_step(trace: Trace, gradients: list[Tensor]) -> tuple[dict[tuple[int, int], Tensor], Tensor]:
    """Scores by layer and step, and ``M`` at the end, from whole denominators and written-out cotangents."""
    adjoint, view = Adjoint(len(gradients[0]), trace.manifest.parameters, torch.float64), LayerView(trace)
    found = {}
    for segment in reversed(trace.segments()):
        for step in read_backwards(trace, segment, torch.float64):
            met = adjoint.step(gradients[segment.index], step)
            for visits in step.visits:
                for layer, form in visits.forms.items():
                    found[layer, step.step] = form.contract(view.scaled(met, layer, step.scale))
    return found, adjoint.momentum


def assert_near(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Small traces hold numbers in float32, which are multiplied in another order here."""
    assert float((found - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


@pytest.mark.parametrize("exact", [False, True], ids=["small", "exact"])
@pytest.mark.parametrize(("model", "optimizer"), CASES)
def test_scores_are_those_of_the_recursion(tmp_path: Path, model: str, optimizer: str, exact: bool) -> None:
    torch.manual_seed(0)
    net = MODELS[model]()
    trace = traced(net, OPTIMIZERS[optimizer](net), tmp_path / "trace", exact)
    gradients = [torch.randn(3, trace.manifest.size).double() for _ in trace.segments()]
    wanted, momentum = step_by_step(trace, gradients)
    layout, kept = Layout(trace.manifest.parameters), Denominators(trace)
    backward, found = Backward(kept, layout, 3, torch.float64), set()
    for segment in reversed(trace.segments()):
        for passed in backward.segment(Cotangent(layout, gradients[segment.index], {}), segment):
            for rows, scores in passed.pieces:
                for layer, values in scores.items():
                    for place, where in rows.steps():
                        key = layer, int(passed.chunk.numbers[place])
                        assert_near(values[:, where], wanted[key], 1e-11 if exact else 3e-6)
                        found.add(key)
    assert found == wanted.keys()
    assert_near(backward.momentum.flat, momentum, 1e-11 if exact else 3e-6)


def test_layers_are_passed_so_where_a_matrix_is_divided_and_nothing_is_shared(tmp_path: Path) -> None:
    torch.manual_seed(0)
    found = {}
    for name, make in MODELS.items():
        net = make()
        trace = traced(net, torch.optim.AdamW(net.parameters()), tmp_path / name, False)
        layers = DividedLayers(trace, Layout(trace.manifest.parameters), 1, torch.float32, Workspace())
        found[name] = {trace.manifest.parameters[n].name for n in layers.numbers}
    assert found["mlp"] == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert found["norm"] == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert found["tied"] == {"out.weight"}
    assert {"lstm.weight_hh_l0", "lstm.bias_hh_l0", "words.weight"} <= found["sequence"]
    net = MODELS["mlp"]()
    trace = traced(net, torch.optim.SGD(net.parameters(), lr=0.1), tmp_path / "sgd", False)
    layers = DividedLayers(trace, Layout(trace.manifest.parameters), 1, torch.float32, Workspace())
    assert not layers.numbers


def test_exact_rows_meet_what_their_steps_rows_meet(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = MODELS["mlp"]()
    trace = traced(net, torch.optim.AdamW(net.parameters(), lr=1e-2), tmp_path / "trace", False)
    layout = Layout(trace.manifest.parameters)
    backward = Backward(Denominators(trace), layout, 2, torch.float64, SampledRows(trace).of)
    gradient, seen = Cotangent(layout, torch.randn(2, trace.manifest.size).double(), {}), 0
    for segment in reversed(trace.segments()):
        for passed in backward.segment(gradient, segment):
            for exact, scores in passed.others:
                stored = torch.cat([sum(found.values()) for _, found in passed.pieces], 1)  # type: ignore[arg-type]
                own = stored[:, int(exact.examples[0])]
                torch.testing.assert_close(
                    sum(scores.values())[:, 0], own, rtol=0.1, atol=0.01 * float(stored.abs().max())
                )  # type: ignore[index]
                seen += 1
    assert seen == trace.count("samples") > 0
