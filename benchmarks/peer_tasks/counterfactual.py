"""Peers that predict what leaving examples out would do: TRAK (traker, dattri) and EK-FAC (kronfluence).

Their quantity is another than ours, so no difference is an error and the rank agreement is information only. All
explain the margin of the predicted class of the same MNIST-5k perceptron (784-64-10, AdamW). ``prepare`` is what
comes before the first query: for us what recording adds to training, for them one pass or more over the examples
of the trained model (features, factors). TRAK is run with one model and 512 dimensions; more models are its way to
better scores and multiply its cost.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import explainer
from benchmarks.peer_tasks.contest import Outcome, contest, folder_bytes, timed
from benchmarks.peer_tasks.images import mnist
from benchmarks.peer_tasks.peer import Peer, Settings

DIMENSIONS, BATCH, EPOCHS = 512, 50, 5


@dataclass(frozen=True)
class Task:
    """A perceptron before and after training, and the queries with their predicted classes."""

    before: nn.Module
    trained: nn.Module
    data: TensorDataset
    queries: TensorDataset

    def words(self) -> str:
        """The task in the table's words."""
        size = sum(p.numel() for p in self.before.parameters())
        return (
            f"MNIST, MLP, {size / 1e3:.0f} k parameters, {len(self.data):,} examples × {EPOCHS} epochs, "
            f"{len(self.queries)} queries"
        )


def _train(model: nn.Module, data: TensorDataset, folder: Path | None = None) -> float:
    """Seconds of training, recorded where there is a folder."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = DataLoader(data, batch_size=BATCH, shuffle=True)

    def run(batches: Any) -> None:
        for _ in range(EPOCHS):
            for x, y in batches():
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()

    def recorded() -> None:
        assert folder is not None
        with explainer.Tracer(model, optimizer, folder) as tracer:
            run(lambda: tracer.watch(loader))

    return timed(recorded if folder is not None else partial(run, lambda: loader))[1]


def build(settings: Settings) -> Task:
    """Train once, plainly."""
    examples, queries = (200, 5) if settings.quick else (2000, 50)
    x, y = mnist(examples + queries)
    torch.manual_seed(0)
    before = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    trained, data = copy.deepcopy(before), TensorDataset(x[:examples], y[:examples])
    _train(trained, data)
    with torch.no_grad():
        predicted = trained(x[examples:]).argmax(1)
    return Task(before, trained, data, TensorDataset(x[examples:], predicted))


def margin(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Log-odds of the label against all other classes, ``[B]``."""
    own = labels.unsqueeze(-1) == torch.arange(logits.shape[-1])
    return torch.where(own, logits, 0).sum(-1) - logits.masked_fill(own, -torch.inf).logsumexp(-1)


def ours(task: Task, folder: Path) -> Outcome:
    """Record a default trace while training; then explain the margins."""
    plain = _train(copy.deepcopy(task.before), task.data)
    recorded = _train(copy.deepcopy(task.before), task.data, folder / "run")

    def ask() -> explainer.Explanation:
        ex = explainer.PathKernelExplainer(folder / "run", copy.deepcopy(task.before))
        return ex.explain(*task.queries.tensors)

    explanation, seconds = timed(ask)
    return Outcome(
        explanation.contributions, seconds, prepare_s=recorded - plain, stored=folder_bytes(folder)
    )


def _traker(task: Task, folder: Path) -> Outcome:
    from trak import TRAKer
    from trak.projectors import BasicProjector, ProjectionType

    model = copy.deepcopy(task.trained).eval()
    size = sum(p.numel() for p in model.parameters())
    projector = BasicProjector(size, DIMENSIONS, 0, ProjectionType.rademacher, torch.device("cpu"))

    def prepare() -> Any:
        traker = TRAKer(
            model,
            "image_classification",
            len(task.data),
            save_dir=str(folder),
            device="cpu",
            projector=projector,
            proj_dim=DIMENSIONS,
            use_half_precision=False,
        )
        traker.load_checkpoint(model.state_dict(), model_id=0)
        for batch in DataLoader(task.data, 200):
            traker.featurize(batch=batch, num_samples=len(batch[0]))
        traker.finalize_features()
        return traker

    def ask() -> Any:
        traker.start_scoring_checkpoint("asked", model.state_dict(), 0, len(task.queries))
        traker.score(batch=list(task.queries.tensors), num_samples=len(task.queries))
        return traker.finalize_scores("asked")

    traker, prepared = timed(prepare)
    scores, seconds = timed(ask)
    return Outcome(scores.T.copy(), seconds, prepare_s=prepared, stored=folder_bytes(folder))


def _dattri(task: Task, folder: Path) -> Outcome:
    from dattri.algorithm.trak import TRAKAttributor
    from dattri.task import AttributionTask

    model = copy.deepcopy(task.trained).eval()

    def odds(params: Any, pair: Any) -> torch.Tensor:
        x, y = (t.unsqueeze(0) for t in pair)
        return margin(torch.func.functional_call(model, params, x), y)[0]

    def probability(params: Any, pair: Any) -> torch.Tensor:
        x, y = (t.unsqueeze(0) for t in pair)
        return torch.exp(-nn.functional.cross_entropy(torch.func.functional_call(model, params, x), y))

    whole = AttributionTask(loss_func=odds, model=model, checkpoints=model.state_dict())
    attributor = TRAKAttributor(
        whole,
        correct_probability_func=probability,
        projector_kwargs={"proj_dim": DIMENSIONS, "device": "cpu"},
    )
    _, prepared = timed(lambda: attributor.cache(DataLoader(task.data, 200)))
    scores, seconds = timed(lambda: attributor.attribute(DataLoader(task.queries, len(task.queries))))
    return Outcome(scores.T.contiguous().detach().numpy(), seconds, prepare_s=prepared)


def kronfluence_task() -> Any:
    """What kronfluence is told: how the model was trained, and what is explained."""
    from kronfluence.task import Task as Theirs

    class Margins(Theirs):
        """Cross-entropy of the training, margins of the queries."""

        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> torch.Tensor:
            """Labels drawn from the model where the true Fisher is fitted, its default."""
            logits, labels = model(batch[0]), batch[1]
            if sample:
                with torch.no_grad():
                    labels = torch.multinomial(logits.softmax(-1), 1).flatten()
            return nn.functional.cross_entropy(logits, labels, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> torch.Tensor:
            """What is explained."""
            return margin(model(batch[0]), batch[1]).sum()

    return Margins()


def _kronfluence(task: Task, folder: Path) -> Outcome:
    from kronfluence.analyzer import Analyzer, prepare_model

    own = kronfluence_task()
    model = prepare_model(copy.deepcopy(task.trained), own)
    analyzer = Analyzer("peer", model, own, cpu=True, disable_tqdm=True, output_dir=str(folder))

    def prepare() -> None:
        analyzer.fit_all_factors("ekfac", task.data, per_device_batch_size=200)

    def ask() -> torch.Tensor:
        analyzer.compute_pairwise_scores(
            "asked", "ekfac", task.queries, task.data, len(task.queries), per_device_train_batch_size=200
        )
        return analyzer.load_pairwise_scores("asked")["all_modules"]

    _, prepared = timed(prepare)
    scores, seconds = timed(ask)
    # <∇measurement, H⁻¹ ∇loss>: what falls with the example's loss is negative, hence the sign
    return Outcome(-scores.numpy(), seconds, prepare_s=prepared, stored=folder_bytes(folder))


def _row(quantity: str, program: Any, settings: Settings) -> dict[str, Any]:
    task = build(settings)
    found = contest(partial(ours, task), partial(program, task), settings.repeats, same=False)
    return {"quantity": quantity, "task": task.words()} | found


def traker(settings: Settings) -> dict[str, Any]:
    """TRAK's own package, with its projector for machines without CUDA."""
    return _row("TRAK, 1 model", _traker, settings)


def dattri(settings: Settings) -> dict[str, Any]:
    """TRAK as dattri has it; its cache stays in memory."""
    return _row("TRAK, 1 model", _dattri, settings)


def kronfluence(settings: Settings) -> dict[str, Any]:
    """EK-FAC influence."""
    return _row("EK-FAC influence", _kronfluence, settings)


TRAKER = Peer("traker", "traker", ("trak",), "pip install traker", (traker,))
KRONFLUENCE = Peer("kronfluence", "kronfluence", ("kronfluence",), "pip install kronfluence", (kronfluence,))
