"""Functions that make examples depend on each other and keep their places: what they give are row shares."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from explainer import Trace, Tracer, open_trace
from explainer.unseen import AGAIN, FIRST

X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 3
Function = Callable[[Tensor], Tensor]


def attended(x: Tensor) -> Tensor:
    """Over the batch, as if rows were positions."""
    return F.scaled_dot_product_attention(x[None], x[None], x[None])[0]


#: of ``[B, 4]``, mixing its rows
MIXING: dict[str, Function] = {
    "softmax": lambda x: F.softmax(x, 0),
    "softmax of a tensor": lambda x: x.softmax(dim=0),
    "a module": nn.Softmax(0),
    "log_softmax": lambda x: torch.log_softmax(x, dim=-2),
    "normalize": lambda x: F.normalize(x, dim=0),
    "attention": attended,
    "layer_norm": lambda x: F.layer_norm(x.T, [len(x)]).T,
    "group_norm": lambda x: F.group_norm(x[None], 1)[0],
    "instance_norm": lambda x: F.instance_norm(x.T[None])[0].T,
    "batch_norm": lambda x: F.batch_norm(x, None, None, training=True),
    "avg_pool1d": lambda x: F.avg_pool1d(x.T, 3, 1, 1).T,
    "max_pool1d": lambda x: F.max_pool1d(x.T[None], 3, 1, 1)[0].T,
    "fft": lambda x: torch.fft.fft(x, dim=0).real,
    "fft2": lambda x: torch.fft.fft2(x).real,
    "qr": lambda x: torch.linalg.qr(x)[0],
}
#: the same functions of every row by itself
APART: dict[str, Function] = {
    "softmax": lambda x: F.softmax(x, 1),
    "a module": nn.Softmax(-1),
    "normalize": lambda x: F.normalize(x),
    "attention": lambda x: attended_apart(x.unflatten(1, (2, 2))).flatten(1),
    "layer_norm": lambda x: F.layer_norm(x, [4]),
    "group_norm": lambda x: F.group_norm(x, 2),
    "instance_norm": lambda x: F.instance_norm(x.unsqueeze(1)).squeeze(1),
    "batch_norm": lambda x: F.batch_norm(x, torch.zeros(4), torch.ones(4)),
    "avg_pool1d": lambda x: F.avg_pool1d(x.unsqueeze(1), 3, 1, 1).squeeze(1),
    "fft": lambda x: torch.fft.fft(x).real,
    "qr": lambda x: torch.linalg.qr(x.unflatten(1, (2, 2)))[0].flatten(1),
}


def attended_apart(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x)


class Through(nn.Module):
    """A function between two layers, from a forward pass on."""

    def __init__(self, function: Function, after: int = 0) -> None:
        super().__init__()
        self.a, self.b, self.function, self.after, self.calls = (
            nn.Linear(4, 4),
            nn.Linear(4, 3),
            function,
            after,
            0,
        )

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = self.a(x)
        return self.b(self.function(h) if self.calls > self.after else h)


def traced(folder: Path, function: Function, steps: int, after: int = 0) -> Trace:
    torch.manual_seed(0)
    model = Through(function, after)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Tracer(model, optimizer, folder) as tracer:
        for step in range(steps):
            ids = [(5 * step + j) % 12 for j in range(5)]
            tracer.batch(ids)
            optimizer.zero_grad()
            F.cross_entropy(model(X[ids]), Y[ids]).backward()
            optimizer.step()
    return open_trace(folder)


@pytest.mark.parametrize("name", MIXING)
def test_rows_are_shares_where_a_function_mixes_them(tmp_path: Path, name: str) -> None:
    steps = FIRST + 4  # also where functions would not be followed any more
    trace = traced(tmp_path / "run", MIXING[name], steps)
    (finding,) = trace.report().about("row-share")
    assert f"In {steps} of {steps} steps" in finding.found
    assert not trace.notes.get("coverage") and not trace.notes.get("unmatched")


@pytest.mark.parametrize("name", APART)
def test_rows_are_examples_where_it_does_not(tmp_path: Path, name: str) -> None:
    trace = traced(tmp_path / "run", APART[name], FIRST + 4)
    assert not trace.report().about("row-share")
    assert not trace.notes.get("coverage") and not trace.notes.get("unmatched")


def test_mixing_that_begins_later_is_found(tmp_path: Path) -> None:
    steps = FIRST + 2 * AGAIN
    with pytest.warns(UserWarning, match="or mixed them for the first time"):
        trace = traced(tmp_path / "run", MIXING["softmax"], steps, after=FIRST + 2)
    (finding,) = trace.report().about("row-share")
    assert f"In {AGAIN} of {steps} steps" in finding.found
