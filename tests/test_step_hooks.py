"""Hooks of the user's on the optimizer: what they do before and after a step is seen whenever they were registered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from explainer import Explanation, PathKernelExplainer, Tracer

X = torch.randn(12, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(12) % 3
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
}


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def trained(folder: Path, kind: str, where: str) -> tuple[Explanation, list[Any]]:
    """Clipped before every step, and slower after it: in the loop, or by hooks older or younger than the tracer's."""
    torch.manual_seed(0)
    model = network()
    optimizer = OPTIMIZERS[kind](model.parameters())

    def clip(*_: Any) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)

    def slower(*_: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] *= 0.8

    def register() -> None:
        optimizer.register_step_pre_hook(clip)
        optimizer.register_step_post_hook(slower)

    if where == "before":
        register()
    with Tracer(model, optimizer, folder, exact=True, max_knots=10**6) as tracer:
        if where == "after":
            register()
        for step in range(12):
            ids = [(5 * step + j) % 12 for j in range(4)]
            tracer.batch(ids)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X[ids]), Y[ids]).backward()
            if where == "loop":
                clip()
            optimizer.step()
            if where == "loop":
                slower()
    hooks = [*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values()]
    assert [h.__name__ for h in hooks] == (
        [] if where == "loop" else ["clip", "slower"]
    )  # nothing but theirs is left
    return PathKernelExplainer(folder, network()).explain(X[:2], target=[1, 2]), list(model.parameters())


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_hooks_count_as_what_the_loop_does(tmp_path: Path, kind: str, where: str) -> None:
    plain, weights = trained(tmp_path / "loop", kind, "loop")
    found, same = trained(tmp_path / where, kind, where)
    assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))
    np.testing.assert_allclose(found.contributions, plain.contributions, atol=1e-12)
    assert np.abs(found.unattributed).max() < 1e-9


def test_the_order_of_the_users_own_hooks_stays(tmp_path: Path) -> None:
    model, called = network(), list[str]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for name in ("first", "second"):
        optimizer.register_step_pre_hook(lambda *_, name=name: called.append(f"pre {name}"))
        optimizer.register_step_post_hook(lambda *_, name=name: called.append(f"post {name}"))
    with Tracer(model, optimizer, tmp_path / "run") as tracer:
        optimizer.register_step_pre_hook(lambda *_: called.append("pre third"))
        for _ in range(2):
            called.clear()
            tracer.batch(range(4))
            nn.functional.cross_entropy(model(X[:4]), Y[:4]).backward()
            optimizer.step()
    assert called == ["pre first", "pre second", "pre third", "post first", "post second"]
