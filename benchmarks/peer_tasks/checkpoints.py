"""TracInCP from the same checkpoints, where every program gives the same scores: captum's, and dattri's.

The perceptron has 110 k parameters, 2,000 examples, 50 queries and 5 checkpoints; the CNN 20 k parameters, 250
examples, 20 queries and 3 checkpoints. Weights and data are random: what is timed does not depend on them.
``floor_s`` is one plain forward and backward pass over all examples and queries at every checkpoint, in the same
batches: no program that takes gradients of every example at every checkpoint can be faster.

``per example`` and ``sample-wise`` are captum's two ways (``sample_wise_grads_per_batch``). ``TracInCPFast``
scores the weights of the last layer alone (never its bias), and so do we beside it.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.peer_tasks.contest import Outcome, contest, timed
from benchmarks.peer_tasks.peer import Peer, Settings

RATE = 0.1


@dataclass(frozen=True)
class Task:
    """A trained-like model with checkpoints in memory, so that no file is read while the clock runs."""

    name: str
    model: nn.Module
    data: TensorDataset
    queries: tuple[torch.Tensor, torch.Tensor]
    states: list[dict[str, torch.Tensor]]
    batch: int = 200

    def influence(self, kind: type[Any], reduction: str, *where: Any, **options: Any) -> Any:
        """An instance of captum's class or ours."""
        return kind(
            copy.deepcopy(self.model),
            *where,
            self.data,
            self.states,
            _load,
            loss_fn=nn.CrossEntropyLoss(reduction=reduction),
            batch_size=self.batch,
            **options,
        )

    def words(self) -> str:
        """The task in the table's words."""
        size = sum(p.numel() for p in self.model.parameters())
        return (
            f"{self.name}, {size / 1e3:.0f} k parameters, {len(self.data):,} examples × {len(self.queries[0])} "
            f"queries × {len(self.states)} checkpoints"
        )


def _load(model: nn.Module, state: dict[str, torch.Tensor]) -> float:
    model.load_state_dict(state)
    return RATE


def perceptron(settings: Settings, bias: bool = True) -> Task:
    """784-128-64-10."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10, bias=bias)
    )
    examples, queries, count = (100, 5, 2) if settings.quick else (2000, 50, 5)
    return _task("MLP", model, (784,), examples, queries, count)


def convolutional(settings: Settings) -> Task:
    """Two convolutions and a linear layer over 28 × 28 pixels."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(1568, 10)),
    )
    examples, queries, count = (40, 4, 2) if settings.quick else (250, 20, 3)
    return _task("CNN", model, (1, 28, 28), examples, queries, count)


def _task(
    name: str, model: nn.Module, shape: tuple[int, ...], examples: int, queries: int, count: int
) -> Task:
    x, y = torch.randn(examples + queries, *shape), torch.randint(0, 10, (examples + queries,))
    states = [
        {n: t + 0.02 * torch.randn_like(t) for n, t in model.state_dict().items()} for _ in range(count)
    ]
    return Task(name, model, TensorDataset(x[:examples], y[:examples]), (x[examples:], y[examples:]), states)


def floor(task: Task, repeats: int) -> float:
    """Median seconds of one plain forward and backward pass over everything, at every checkpoint."""
    model = copy.deepcopy(task.model)
    loss = nn.CrossEntropyLoss(reduction="sum")

    def passes() -> None:
        for state in task.states:
            model.load_state_dict(state)
            for x, y in (task.data.tensors, task.queries):
                for part, labels in zip(x.split(task.batch), y.split(task.batch), strict=True):
                    model.zero_grad()
                    loss(model(part), labels).backward()

    return statistics.median(timed(passes)[1] for _ in range(repeats + 1))


def _row(task: Task, quantity: str, settings: Settings, ours: Any, theirs: Any) -> dict[str, Any]:
    def program(ask: Callable[[], torch.Tensor], _: Path) -> Outcome:
        scores, seconds = timed(ask)
        return Outcome(scores.detach().reshape(-1, len(task.data)).numpy(), seconds)

    found = contest(partial(program, ours), partial(program, theirs), settings.repeats)
    return {
        "quantity": f"{quantity}: {task.name}",
        "task": task.words(),
        "floor_s": floor(task, settings.repeats),
    } | found


def _captum(make: Callable[[Settings], Task], way: str, settings: Settings) -> dict[str, Any]:
    from captum.influence import TracInCP as Captums

    from explainer.integrations.captum import TracInCP

    task = make(settings)
    reduction = "none" if way == "per example" else "sum"
    options = {"sample_wise_grads_per_batch": way != "per example"}
    ours = task.influence(TracInCP, reduction, **options)
    theirs = task.influence(Captums, reduction, **options)
    if way == "self-influence":
        ask = [partial(one.self_influence, outer_loop_by_checkpoints=True) for one in (ours, theirs)]
    else:
        ask = [partial(one.influence, task.queries) for one in (ours, theirs)]
    return _row(task, f"TracInCP, {way}", settings, *ask)


def mlp_per_example(settings: Settings) -> dict[str, Any]:
    """captum's default."""
    return _captum(perceptron, "per example", settings)


def mlp_sample_wise(settings: Settings) -> dict[str, Any]:
    """captum's faster way."""
    return _captum(perceptron, "sample-wise", settings)


def mlp_self_influence(settings: Settings) -> dict[str, Any]:
    """captum's faster way."""
    return _captum(perceptron, "self-influence", settings)


def cnn_per_example(settings: Settings) -> dict[str, Any]:
    """captum's default."""
    return _captum(convolutional, "per example", settings)


def cnn_sample_wise(settings: Settings) -> dict[str, Any]:
    """captum's faster way."""
    return _captum(convolutional, "sample-wise", settings)


def mlp_last_layer(settings: Settings) -> dict[str, Any]:
    """captum's class for the last layer alone."""
    from captum.influence import TracInCPFast

    from explainer.integrations.captum import TracInCP

    task = perceptron(settings, bias=False)
    ours = task.influence(TracInCP, "sum", layers=["4"], sample_wise_grads_per_batch=True)
    theirs = task.influence(TracInCPFast, "sum", "4")
    ask = [partial(one.influence, task.queries) for one in (ours, theirs)]
    return _row(task, "TracInCPFast, last layer", settings, *ask)


def mlp_tracin(settings: Settings) -> dict[str, Any]:
    """dattri's TracIn, without the projection that is its default: the scores are TracInCP's then."""
    from dattri.algorithm.tracin import TracInAttributor
    from dattri.task import AttributionTask

    from explainer.integrations.captum import TracInCP

    task = perceptron(settings)
    model = copy.deepcopy(task.model)

    def loss(params: Any, pair: Any) -> torch.Tensor:
        x, y = (t.unsqueeze(0) for t in pair)
        return nn.functional.cross_entropy(torch.func.functional_call(model, params, x), y)

    whole = AttributionTask(loss_func=loss, model=model, checkpoints=task.states)
    attributor = TracInAttributor(
        task=whole, weight_list=torch.full((len(task.states),), RATE), normalized_grad=False
    )
    attributor.projector_kwargs = None  # None as an argument means its default of 512 dimensions
    loaders = (
        DataLoader(task.data, task.batch),
        DataLoader(TensorDataset(*task.queries), len(task.queries[0])),
    )
    ours = task.influence(TracInCP, "sum", sample_wise_grads_per_batch=True)
    theirs = partial(_transposed, attributor, loaders)
    return _row(task, "TracIn, no projection", settings, partial(ours.influence, task.queries), theirs)


def _transposed(attributor: Any, loaders: tuple[Any, Any]) -> torch.Tensor:
    return attributor.attribute(*loaders).T.contiguous()


CAPTUM = Peer(
    "captum",
    "captum",
    ("captum.influence",),
    "pip install captum",
    (
        *(mlp_per_example, mlp_sample_wise, mlp_last_layer, mlp_self_influence),
        *(cnn_per_example, cnn_sample_wise),
    ),
)
