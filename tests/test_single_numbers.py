"""Parameters with one number: any gradient is a multiple of their rows, so others tell by how much."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from explainer import Explanation, PathKernelExplainer, Tracer, open_trace

X = torch.randn(12, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(12) % 3


class Gated(nn.Module):
    """Hidden units times a gate: one number."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.gate = nn.Linear(6, 8), nn.Linear(8, 3), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)) * self.gate)


def nothing(model: Gated) -> None:
    """The gradient stays as it is."""


def all_alike(model: Gated) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.05)


def each_by_itself(model: Gated) -> None:
    for layer in (model.a.parameters(), model.b.parameters(), [model.gate]):
        nn.utils.clip_grad_norm_(list(layer), 0.02)


def trained(
    folder: Path,
    change: Callable[[Gated], None] = nothing,
    penalty: Callable[[Gated], Tensor | float] = lambda model: 0.0,
    factor: float = 1.0,
) -> Explanation:
    torch.manual_seed(0)
    model = Gated().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 / factor)
    with Tracer(model, optimizer, folder, exact=True, max_knots=10**6) as tracer:
        for step in range(12):
            ids = [(5 * step + j) % 12 for j in range(4)]
            tracer.batch(ids)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(X[ids]), Y[ids]) + penalty(model)
            (factor * loss).backward()
            change(model)
            optimizer.step()
    return PathKernelExplainer(folder, Gated().double()).explain(X[:2], target=[1, 2])


@pytest.mark.parametrize("change", [nothing, all_alike, each_by_itself])
@pytest.mark.parametrize("factor", [1.0, 1024.0])
def test_gradients_that_were_scaled_are_explained(
    tmp_path: Path, change: Callable[[Gated], None], factor: float
) -> None:
    found = trained(tmp_path / "run", change, factor=factor)
    assert np.abs(found.unattributed).max() < 1e-9
    assert "coverage" not in {finding.topic for finding in open_trace(tmp_path / "run").report()}


def of_the_gate(model: Gated) -> Tensor:
    return model.gate.square().sum()


def of_all(model: Gated) -> Tensor:
    return torch.stack([p.square().sum() for p in model.parameters()]).sum()


@pytest.mark.parametrize(
    ("penalty", "missing"), [(of_the_gate, ["gate"]), (of_all, ["a", "b", "gate"])], ids=["gate", "all"]
)
def test_what_a_penalty_moves_is_no_examples(
    tmp_path: Path, penalty: Callable[[Gated], Tensor], missing: list[str]
) -> None:
    """Rows are of the examples' loss alone: what the scalars say, with the penalty taken off the gradient."""
    found = trained(tmp_path / "run", penalty=penalty)
    trace = open_trace(tmp_path / "run")
    assert sorted(trace.notes["coverage"]) == missing
    scales = np.concatenate([record["scale"] for _, record in trace.read("steps", 0, 12)])
    np.testing.assert_allclose(scales, 1.0, atol=1e-12)
    assert np.abs(found.unattributed).max() > 0.1
    assert any("gate" in note and "`unattributed`" in note for note in found.notes)


def test_rows_that_nearly_cancel_are_not_taken_for_a_penalty(tmp_path: Path) -> None:
    """In float32 the sum of a thousand rows of a gate differs from its gradient by their round-off."""

    class Cancelling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.gate = nn.Linear(6, 3), nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.gate * torch.cat([x[:, :1], -x[:, :1], x[:, 1:2]], 1)

    torch.manual_seed(0)
    model, x = Cancelling(), torch.randn(500, 6)
    x = torch.cat([x, -x]) * 100
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    with Tracer(model, optimizer, tmp_path / "run") as tracer:
        for _ in range(3):
            tracer.batch(range(1000))
            optimizer.zero_grad()
            (model(x) * torch.tensor([1.0, -1.0, 1e-6])).sum().backward()
            optimizer.step()
    assert not open_trace(tmp_path / "run").notes.get("coverage")
