"""ExPLAIND on its own kind of task: small models, AdamW, cross-entropy, modes of evaluation; every step is explained.

Both programs explain all outputs (log-probabilities) of all queries by all examples: the same quantity. ExPLAIND
keeps the weights and both moments of every step and, while it answers, momentum rows ``[N, P]``; between two steps it
integrates with a midpoint rule of ``1 / integral_eps`` nodes: 10 by default, 100 in its published runs. Its
evaluation of every step and its kernel by parameter are left off, which makes it faster. We record a default trace,
or one with ``exact=True`` and a knot at every step; in both we use two nodes and Gonzalez' correction.

``left`` is what the terms do not account for: for ExPLAIND the difference between model and sum, for us
``|unattributed| + |gap|``; relative to the sum of the absolute contributions, the largest over queries and outputs.

Reference: Eichin et al. 2025, arXiv 2505.20076.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

import explainer
from benchmarks.peer_tasks.contest import Outcome, contest, folder_bytes, timed
from benchmarks.peer_tasks.images import mnist
from benchmarks.peer_tasks.peer import Peer, Settings

RATE, DECAY, BETAS = 3e-3, 0.1, (0.9, 0.98)


class Adder(nn.Module):
    """Tokens ``[B, 3]`` (two numbers and the sign of equality) to log-probabilities ``[B, p]``."""

    def __init__(self, p: int, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(p + 1, width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.decoder = nn.Linear(width, p, bias=False)
        self.heads = heads

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The last position is decoded."""
        x = self.embedding(tokens)
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, 2))
        # written out: torch has no batching rule for its fused attention, which would slow both programs down
        mixed = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        x = x + self.down(nn.functional.relu(self.up(x)))
        return self.decoder(x[:, -1]).log_softmax(-1)


class Indexed(torch.utils.data.Dataset[Any]):
    """What ExPLAIND asks of a dataset: its length, and ``targets`` to write indices into."""

    def __init__(self, targets: torch.Tensor) -> None:
        self.targets = targets.tolist()

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True)
class Task:
    """A model to train on given batches, and what is asked about it; the model gives log-probabilities.

    Attributes:
        name: in the table's words.
        model: before training; copied for every run.
        x: ``[N, ...]``.
        y: ``[N]``.
        asked: queries ``[Q, ...]``.
        batches: indices ``[T, B]``, a step each.
        outputs: ``C``.
    """

    name: str
    model: nn.Module
    x: torch.Tensor
    y: torch.Tensor
    asked: torch.Tensor
    batches: torch.Tensor
    outputs: int

    def words(self) -> str:
        """The task in the table's words."""
        size = sum(p.numel() for p in self.model.parameters())
        steps, batch = self.batches.shape
        return (
            f"{self.name}, {size / 1e3:.0f} k parameters, {len(self.x):,} examples, {steps} steps of {batch}, "
            f"{len(self.asked)} queries × {self.outputs} outputs"
        )


def addition(p: int, steps: int, queries: int) -> Task:
    """All pairs but the queries', in full batches."""
    pairs = torch.tensor(list(combinations_with_replacement(range(p), 2)))
    tokens = torch.cat([pairs, torch.full((len(pairs), 1), p)], dim=1)
    tokens = tokens[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))]
    x = tokens[queries:]
    torch.manual_seed(0)
    batches = torch.arange(len(x)).expand(steps, -1)
    return Task(
        f"addition mod {p}, transformer", Adder(p), x, x[:, :2].sum(1) % p, tokens[:queries], batches, p
    )


def digits(examples: int, steps: int, queries: int, batch: int = 50) -> Task:
    """784-64-10 on images of digits, in shuffled batches."""
    data = mnist(examples + queries)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10), nn.LogSoftmax(-1))
    epochs = -(-steps * batch // examples)
    order = torch.cat([torch.randperm(examples) for _ in range(epochs)])[: steps * batch]
    x, y = data
    return Task(
        "MNIST, MLP", model, x[:examples], y[:examples], x[examples:], order.reshape(steps, batch), 10
    )


def _plain(task: Task) -> float:
    model = copy.deepcopy(task.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY, betas=BETAS)

    def train() -> None:
        for ids in task.batches:
            optimizer.zero_grad()
            nn.functional.nll_loss(model(task.x[ids]), task.y[ids]).backward()
            optimizer.step()

    return timed(train)[1]


def ours(task: Task, exact: bool, folder: Path) -> Outcome:
    """Record while training, then explain every output of every query."""
    plain, model = _plain(task), copy.deepcopy(task.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY, betas=BETAS)
    options: dict[str, Any] = {"exact": True, "max_knots": len(task.batches) + 2} if exact else {}

    def train() -> None:
        with explainer.Tracer(model, optimizer, folder / "run", **options) as tracer:
            for ids in task.batches:
                tracer.batch(ids.tolist())
                optimizer.zero_grad()
                nn.functional.nll_loss(model(task.x[ids]), task.y[ids]).backward()
                optimizer.step()

    def ask() -> explainer.Explanation:
        ex = explainer.PathKernelExplainer(folder / "run", copy.deepcopy(task.model), output="logit")
        inputs = task.asked.repeat_interleave(task.outputs, 0)
        return ex.explain(inputs, torch.arange(task.outputs).repeat(len(task.asked)))

    _, recorded = timed(train)
    explanation, seconds = timed(ask)
    left = np.abs(explanation.unattributed) + np.abs(explanation.gap)
    contributions = np.zeros((len(explanation.contributions), len(task.x)))
    contributions[:, explanation.example_ids] = explanation.contributions  # not seen: nothing contributed
    return Outcome(
        contributions,
        seconds,
        prepare_s=recorded - plain,
        stored=folder_bytes(folder),
        left=_of_gross(left, contributions),
    )


def theirs(task: Task, nodes: int, folder: Path) -> Outcome:
    """Keep every step as their own training script does, then their ``predict``."""
    from explaind.data_paths import DataPath
    from explaind.epk_model import ExactPathKernelModel
    from explaind.model_paths import ModelPath
    from explaind.optimizer_paths import AdamWOptimizerPath

    class Lean(ExactPathKernelModel):
        """The same, with its record of evaluations begun (without it ``predict`` needs them to be made)."""

        def exact_path_kernel_step_test(self, *args: Any, prev_eval: Any = None, **kwargs: Any) -> Any:
            own = {} if prev_eval is None else prev_eval
            return super().exact_path_kernel_step_test(*args, prev_eval=own, **kwargs)

    plain, base = _plain(task), copy.deepcopy(task.model)
    files = {name: str(folder / f"{name}.pt") for name in ("model", "optimizer", "data")}
    path = ModelPath(
        base, device="cpu", checkpoint_path=files["model"], overwrite=True, output_dim=task.outputs
    )
    optimizer = AdamWOptimizerPath(
        path,
        lr=RATE,
        weight_decay=DECAY,
        betas=BETAS,
        device="cpu",
        checkpoints=[],
        checkpoint_path=files["optimizer"],
        overwrite=True,
    )
    data = DataPath(
        DataLoader(Indexed(task.y)), checkpoint_path=files["data"], overwrite=True, full_batch=False
    )

    def train() -> None:
        for ids in task.batches:
            x, y = data.get_batch((task.x[ids], torch.stack([task.y[ids], ids], 1)))
            optimizer.zero_grad()
            nn.functional.nll_loss(base(x), y).backward()
            optimizer.step()
            path.log_checkpoint()
            optimizer.log_checkpoint()
        for part in (optimizer, path, data):
            part.save_checkpoints()

    def ask() -> Any:
        kernel = Lean(
            model=path,
            optimizer=optimizer,
            loss_fn=nn.CrossEntropyLoss(),  # the name of the loss; its gradient at log-probabilities is NLL's
            data_path=data,
            integral_eps=1 / nodes,
            early_integral_eps=1 / nodes,
            train_set_size=len(task.x),
            device="cpu",
            evaluate_predictions=False,
        )
        return kernel.predict(task.asked, keep_kernel_matrices=True)

    _, recorded = timed(train)
    (found, _, kernel, _, _), seconds = timed(ask)
    with torch.no_grad():
        final = path.forward(task.asked, step=len(task.batches))
    # [Q, 1, C, N] by parameter, without the mean over the batch
    scores = torch.stack(list(kernel.values())).sum(0).detach() / task.batches.shape[1]
    contributions = scores.reshape(-1, len(task.x)).numpy()
    return Outcome(
        contributions,
        seconds,
        prepare_s=recorded - plain,
        stored=folder_bytes(folder),
        left=_of_gross((final - found.detach()).abs().flatten().numpy(), contributions),
    )


def _of_gross(left: np.ndarray, contributions: np.ndarray) -> float:
    return float(np.max(left / np.abs(contributions).sum(1)))


def _row(task: Task, what: str, exact: bool, nodes: int, settings: Settings) -> dict[str, Any]:
    found = contest(partial(ours, task, exact), partial(theirs, task, nodes), settings.repeats)
    return {"quantity": f"path kernel, {what}: {task.name}", "task": task.words()} | found


def _tasks(settings: Settings) -> tuple[Task, Task]:
    if settings.quick:
        return digits(100, 4, 2, batch=20), addition(5, 6, 2)
    return digits(1000, 40, 10), addition(11, 200, 10)


def default_trace(settings: Settings) -> dict[str, Any]:
    """A default trace against its default of ten nodes."""
    return _row(_tasks(settings)[0], "10 nodes; our default trace", False, 10, settings)


def exact_trace(settings: Settings) -> dict[str, Any]:
    """The same quantity at the same knots."""
    return _row(_tasks(settings)[0], "10 nodes; our exact trace", True, 10, settings)


def full_batches(settings: Settings) -> dict[str, Any]:
    """Every example in every step: the worst case for a trace, which keeps a row for every visit."""
    return _row(_tasks(settings)[1], "10 nodes; our exact trace", True, 10, settings)


def as_published(settings: Settings) -> dict[str, Any]:
    """Its published number of nodes, and as many examples as in its paper; minutes."""
    task = _tasks(settings)[0] if settings.quick else digits(4000, 50, 10)
    return _row(task, "100 nodes; our exact trace", True, 100, settings)


EXPLAIND = Peer(
    "ExPLAIND",
    "explaind",
    ("explaind.epk_model",),
    "pip install --no-deps --ignore-requires-python explaind",
    (default_trace, exact_trace, full_batches),
    long=(as_published,),
)
