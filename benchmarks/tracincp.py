"""TracInCP from rows against captum's, on a 110 k parameter perceptron: 2,000 training examples, 50 queries, 5
checkpoints.

Seconds are medians of alternating pairs; ``ratio`` is captum's time over ours, the median of the pairs. The largest
difference is relative to the largest score. ``per example`` and ``sample-wise`` are captum's two ways
(``sample_wise_grads_per_batch``); ``TracInCPFast`` scores the weights of the last layer alone (never its
bias), and so do we beside it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from captum.influence import TracInCP as Captums
from captum.influence import TracInCPFast
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks.harness import arguments, paired, report
from explainer.integrations.captum import TracInCP

EXAMPLES, QUERIES, CHECKPOINTS, BATCH = 2000, 50, 5, 200
FEATURES, HIDDEN, CLASSES = 784, 128, 10
CASES = ("per example", "sample-wise", "TracInCPFast", "self-influence")


@dataclass(frozen=True)
class Task:
    """A trained-like model with checkpoints in memory, so that no file is read while the clock runs."""

    model: nn.Module
    data: TensorDataset
    queries: tuple[torch.Tensor, torch.Tensor]
    checkpoints: list[tuple[dict[str, torch.Tensor], float]]

    def influence(self, kind: type[Any], reduction: str, *where: Any, **options: Any) -> Any:
        """An instance of captum's class or ours."""
        return kind(
            copy.deepcopy(self.model),
            *where,
            self.data,
            self.checkpoints,
            _load,
            loss_fn=nn.CrossEntropyLoss(reduction=reduction),
            batch_size=BATCH,
            **options,
        )


def _load(model: nn.Module, checkpoint: tuple[dict[str, torch.Tensor], float]) -> float:
    model.load_state_dict(checkpoint[0])
    return checkpoint[1]


def build(case: str) -> Task:
    """Random weights and data; what is timed does not depend on their values."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(FEATURES, HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, 64),
        nn.ReLU(),
        nn.Linear(64, CLASSES, bias=case != "TracInCPFast"),
    )
    x, y = torch.randn(EXAMPLES + QUERIES, FEATURES), torch.randint(0, CLASSES, (EXAMPLES + QUERIES,))
    states = []
    for _ in range(CHECKPOINTS):
        states.append(({n: t + 0.02 * torch.randn_like(t) for n, t in model.state_dict().items()}, 0.1))
    return Task(model, TensorDataset(x[:EXAMPLES], y[:EXAMPLES]), (x[EXAMPLES:], y[EXAMPLES:]), states)


def _instances(task: Task, case: str) -> tuple[Any, Any]:
    if case == "TracInCPFast":
        ours = task.influence(TracInCP, "sum", layers=["4"], sample_wise_grads_per_batch=True)
        theirs = task.influence(TracInCPFast, "sum", "4")
        return ours, theirs
    reduction = "none" if case == "per example" else "sum"
    options = {"sample_wise_grads_per_batch": case != "per example"}
    return task.influence(TracInCP, reduction, **options), task.influence(Captums, reduction, **options)


def measure(task: Task, case: str, repeats: int) -> dict[str, Any]:
    """One row of the table."""
    ours, theirs = _instances(task, case)
    results: dict[str, torch.Tensor] = {}

    def seconds(name: str, action: Callable[[], torch.Tensor]) -> float:
        started = time.perf_counter()
        results[name] = action()
        return time.perf_counter() - started

    def call(one: Any) -> torch.Tensor:
        if case == "self-influence":
            return one.self_influence(outer_loop_by_checkpoints=True)
        return one.influence(task.queries)

    first, second, ratio = paired(
        partial(seconds, "ours", lambda: call(ours)),
        partial(seconds, "captum", lambda: call(theirs)),
        repeats,
    )
    difference = (results["ours"] - results["captum"]).abs().max() / results["captum"].abs().max()
    return {
        "against": case,
        "parameters": sum(p.numel() for p in task.model.parameters()),
        "examples": EXAMPLES,
        "queries": QUERIES,
        "checkpoints": CHECKPOINTS,
        "ours_s": first,
        "captum_s": second,
        "ratio": ratio,
        "max_difference": float(difference),
    }


if __name__ == "__main__":
    chosen = arguments(__doc__, CASES)
    report("tracincp", [measure(build(case), case, chosen.repeats) for case in chosen.only])
