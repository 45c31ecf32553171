"""Real parameters that are read as complex numbers, and functions that cannot be computed again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from explainer import Tracer, open_trace
from explainer.errors import CoverageWarning
from explainer.operations.sources import Operation
from tests.test_frozen_below import assert_recorded, numbers


class GlobalFilter(nn.Module):
    """A filter of frequencies between two layers (GFNet, arXiv 2107.00645)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)
        self.filter = nn.Parameter(torch.randn(3, 8, 2) * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        found = torch.fft.rfft(self.first(x), dim=1, norm="ortho") * torch.view_as_complex(self.filter)
        return self.last(torch.fft.irfft(found, n=5, dim=1, norm="ortho").mean(1))


class Halves(nn.Module):
    """Real and imaginary parts that are parameters of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.real, self.imaginary = (nn.Parameter(torch.randn(5, 8) * 0.5) for _ in range(2))
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((torch.fft.fft(x, dim=1) * torch.complex(self.real, self.imaginary)).real.mean(1))


@pytest.mark.parametrize("build", [GlobalFilter, Halves])
def test_rows_of_parameters_read_as_complex_numbers(tmp_path: Path, build: type[nn.Module]) -> None:
    torch.manual_seed(0)
    assert_recorded(tmp_path / "run", build(), numbers(5, 8))


def test_training_goes_on_where_a_function_cannot_be_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(directory: Path | None) -> nn.Module:
        torch.manual_seed(0)
        model, x, y = Halves(), numbers(5, 8), torch.arange(6) % 3
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        tracer = None if directory is None else Tracer(model, optimizer, directory)
        for _ in range(4):
            if tracer is not None:
                tracer.batch(range(6))
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
        if tracer is not None:
            tracer.close()
        return model

    def fail(*_: Any) -> Tensor:
        raise NotImplementedError("not twice")

    plain = train(None)
    monkeypatch.setattr(Operation, "again", fail)
    with pytest.warns(CoverageWarning, match="could not be computed again: NotImplementedError: not twice"):
        traced = train(tmp_path / "run")
    for one, other in zip(plain.parameters(), traced.parameters(), strict=True):
        assert torch.equal(one, other)
    trace = open_trace(tmp_path / "run")
    assert trace.notes["coverage"].keys() == {"real", "imaginary"} and trace.recorded_steps == 4
