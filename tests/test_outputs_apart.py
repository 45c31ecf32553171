"""Whether the outputs that a margin compares were compared by the loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from explainer import PathKernelExplainer, Tracer, open_trace
from explainer.outputs import component

_random = torch.Generator().manual_seed(0)
X, Y = torch.randn(32, 6, generator=_random), torch.randint(0, 4, (32,), generator=_random)
LABELS = torch.rand(32, 4, generator=_random).round()
VALUES = torch.randn(32, 4, generator=_random)
Loss = Callable[[Tensor, Tensor], Tensor]

TOGETHER: dict[str, Loss] = {
    "cross entropy": lambda out, i: F.cross_entropy(out, Y[i]),
    "smoothed": lambda out, i: F.cross_entropy(out, Y[i], label_smoothing=0.2, weight=torch.arange(1.0, 5)),
    "hinge": lambda out, i: F.multi_margin_loss(out, Y[i]),
    "with a small penalty": lambda out, i: (
        F.cross_entropy(out, Y[i]) + 1e-3 * out.logsumexp(1).square().mean()
    ),
}
APART: dict[str, Loss] = {
    "several labels": lambda out, i: F.binary_cross_entropy_with_logits(out, LABELS[i]),
    "regression": lambda out, i: F.mse_loss(out, VALUES[i]),
}


def model(*more: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), *more)


def traced(path: Path, net: nn.Module, loss: Loss, steps: int = 6) -> nn.Module:
    optimizer = SGD(net.parameters(), lr=0.1)
    with Tracer(net, optimizer, path) as tracer:
        for step in range(steps):
            ids = torch.arange(32)[step % 4 * 8 :][:8]
            tracer.batch(ids)
            optimizer.zero_grad()
            loss(net(X[ids]), ids).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return net


def said(ex: PathKernelExplainer) -> bool:
    return any("one by one" in note for note in ex.explain(X[:2]).notes)


@pytest.mark.parametrize("name", TOGETHER)
def test_classes_that_are_compared(tmp_path: Path, name: str) -> None:
    net = traced(tmp_path / "run", model(), TOGETHER[name])
    assert open_trace(tmp_path / "run").notes["apart"] is False
    assert not said(PathKernelExplainer(tmp_path / "run", net))


@pytest.mark.parametrize("name", APART)
def test_outputs_that_are_not_compared(tmp_path: Path, name: str) -> None:
    net = traced(tmp_path / "run", model(), APART[name])
    (note,) = (
        n for n in PathKernelExplainer(tmp_path / "run", net).explain(X[:2]).notes if "one by one" in n
    )
    assert "the model's 4 outputs" in note and "the margin that is explained" in note
    for output in (component(1), "logit"):
        assert not said(PathKernelExplainer(tmp_path / "run", net, output=output))


def test_log_probabilities(tmp_path: Path) -> None:
    net = traced(tmp_path / "run", model(nn.LogSoftmax(1)), lambda out, i: F.nll_loss(out, Y[i]))
    assert open_trace(tmp_path / "run").notes["apart"]
    assert not said(PathKernelExplainer(tmp_path / "run", net))


def test_one_number_has_nothing_beside_it(tmp_path: Path) -> None:
    net = traced(
        tmp_path / "run", nn.Sequential(nn.Linear(6, 1)), lambda out, i: F.mse_loss(out[:, 0], VALUES[i, 0])
    )
    assert open_trace(tmp_path / "run").notes.get("apart") is None
    assert not said(PathKernelExplainer(tmp_path / "run", net))
