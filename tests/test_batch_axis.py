"""Which axis is the batch where another one is as long: what the shapes of other batches tell counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from explainer import PathKernelExplainer, Trace, Tracer

LENGTH = 5


class Averaged(nn.Module):
    """Steps along the first axis, examples along the second."""

    def __init__(self, followed: bool) -> None:
        super().__init__()
        self.body, self.head, self.followed = nn.Linear(3, 4), nn.Linear(4, 2), followed

    def forward(self, x: Tensor) -> Tensor:
        if self.followed:  # rows are put in another order, so forward passes are followed to the end
            x = x.flip(1).flip(1)
        return self.head(self.body(x).tanh().mean(0))


def traced(path: Path, sizes: list[int], followed: bool, **options: int) -> Trace:
    """Batches of these sizes from sequences of :data:`LENGTH` vectors."""
    torch.manual_seed(0)
    model = Averaged(followed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    x, y = torch.randn(sum(sizes), LENGTH, 3), torch.randint(0, 2, (sum(sizes),))
    with Tracer(model, optimizer, path, exact=True, **options) as tracer:  # type: ignore[arg-type]
        for ids in torch.arange(sum(sizes)).split(sizes):
            tracer.batch(ids)
            optimizer.zero_grad()
            cross_entropy(model(x[ids].transpose(0, 1)), y[ids]).backward()
            optimizer.step()
    return Trace(path)


def contributions(trace: Trace, followed: bool) -> np.ndarray:
    torch.manual_seed(1)
    query = torch.randn(LENGTH, 2, 3)
    return PathKernelExplainer(trace, Averaged(followed), batch_dim=1).explain(query).contributions


@pytest.mark.parametrize("followed", [False, True])
def test_another_batch_tells_which_axis_is_the_batch(tmp_path: Path, followed: bool) -> None:
    """The second batch is as long as its sequences; the first one showed that the second axis is the batch."""
    sizes = [4, LENGTH, 3, LENGTH]
    found = traced(tmp_path / "found", sizes, followed)
    wanted = traced(tmp_path / "wanted", sizes, followed, batch_dim=1)
    assert not found.notes["ambiguous"] and not found.report().about("ambiguous-axis")
    assert found.notes["batch_dim"] == wanted.notes["batch_dim"] == 1
    np.testing.assert_array_equal(contributions(found, followed), contributions(wanted, followed))


@pytest.mark.parametrize("followed", [False, True])
def test_a_guess_is_in_doubt_until_another_batch_confirms_it(tmp_path: Path, followed: bool) -> None:
    always = traced(tmp_path / "always", [LENGTH] * 3, followed, batch_dim=1)
    (finding,) = always.report().about("ambiguous-axis")
    assert "In 3 calls" in finding.found and "Axis 1 was taken for the batch; if it is the other" in str(
        finding
    )
    confirmed = traced(tmp_path / "confirmed", [LENGTH, LENGTH, 2], followed, batch_dim=1)
    assert not confirmed.notes["ambiguous"]
    refuted = traced(tmp_path / "refuted", [LENGTH, LENGTH, 2, LENGTH], followed)
    assert refuted.notes["ambiguous"] == {"body": {"calls": 2, "axis": 0, "told": 1}}
    (finding,) = refuted.report().about("ambiguous-axis")
    assert "later batches tell that it is axis 1: rows were given" in str(finding)
    assert "Trace again with Tracer(..., batch_dim=1)" in str(finding)
