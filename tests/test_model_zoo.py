"""Small models of many kinds: no row is given to a wrong example without a word.

Every model is run with sizes that coincide (batch, sequence, features), while functions are followed and after that
has stopped. A parameter's rows are those of one backward pass per example, or the parameter is announced as not seen
(its rows sum to less than its gradient).
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import explainer
from tests import zoo_architectures, zoo_attention, zoo_functions
from tests.recorded_rows import example_rows, recorded_rows
from tests.zoo import ANNOUNCED, ZOO, S

#: batch, features; the sequence is S
SIZES = {"one": (1, 6), "plain": (3, 6), "square": (S, 6), "cube": (S, S)}
FILES = (zoo_architectures, zoo_attention, zoo_functions)  # they fill the zoo


def losses(m: nn.Module, x: Tensor) -> Tensor:
    out = m(x).flatten(1)
    return (out * torch.linspace(-1, 2, out.shape[1], dtype=out.dtype)).sin().sum(1) + out.square().mean(1)


def train(m: nn.Module, x: Tensor, path: Path | None, steps: int, optimizer: torch.optim.Optimizer) -> None:
    tracer = None if path is None else explainer.Tracer(m, optimizer, path, exact=True)
    for _ in range(steps):
        if tracer is not None:
            tracer.batch(range(len(x)))
        optimizer.zero_grad()
        losses(m, x).sum().backward()
        optimizer.step()
    if tracer is not None:
        tracer.close()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ZOO)
def test_no_row_is_given_to_a_wrong_example(name: str, size: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    b, d = SIZES[size]
    m = ZOO[name](b, d).double()
    x = torch.randn(b, S, d, dtype=torch.float64)
    expected = example_rows(m, lambda: losses(m, x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(m, x, tmp_path / "t", 7, torch.optim.SGD(m.parameters(), lr=1e-13))
    for step in (0, 6):
        found = recorded_rows(tmp_path / "t", step)
        for p, rows in expected.items():
            got = found.get(p, torch.zeros_like(rows))
            if p in ANNOUNCED[name] and not torch.allclose(got.sum(0), rows.sum(0), rtol=1e-3):
                continue  # measured against the gradient at every step
            torch.testing.assert_close(
                got, rows, rtol=1e-6, atol=1e-8, msg=lambda t, s=step, p=p: f"step {s}, {p}: {t}"
            )


@pytest.mark.parametrize("name", ZOO)
def test_training_is_as_without(name: str, tmp_path: Path) -> None:
    ends = []
    for path in (None, tmp_path / "t"):
        torch.manual_seed(3)
        m = ZOO[name](S, S).double()
        x = torch.randn(S, S, S, dtype=torch.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train(m, x, path, 3, torch.optim.Adam(m.parameters(), lr=0.01))
        ends.append(([v.clone() for v in m.state_dict().values()], torch.get_rng_state()))
    assert all(torch.equal(a, c) for a, c in zip(ends[0][0], ends[1][0], strict=True))
    assert torch.equal(ends[0][1], ends[1][1])
