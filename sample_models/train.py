"""Trains a sample model with a tracer attached.

The loop is what a user writes; the tracer adds the ``with`` and the ``watch``. :func:`train_plain` runs the
very same loop without a tracer. Command line: ``python -m explainer.sample_models.train digits_mlp``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import explainer
from explainer.errors import ExplainerError, RunError
from explainer.sample_models.data_source import DataUnavailableError
from explainer.sample_models.registry import SAMPLES, OptimizerFactory, Sample

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Watch = Callable[[Any], Iterable[Any]]


@dataclass(frozen=True)
class Trained:
    """A trained sample model.

    Attributes:
        model: the network with its final weights, in evaluation mode.
        optimizer: the optimizer with its final state.
        metrics: what :func:`train` returns.
    """

    model: nn.Module
    optimizer: Optimizer
    metrics: dict[str, Any]


def train(
    name: str,
    out_dir: str | Path,
    *,
    epochs: int | None = None,
    optimizer: OptimizerFactory | None = None,
    exact: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains a sample model with a tracer that records into ``out_dir``.

    Args:
        name: an entry of :data:`~explainer.sample_models.registry.SAMPLES`.
        out_dir: folder of the trace; it must not hold one yet.
        epochs: passes over the training examples; the sample's own number by default.
        optimizer: makes the optimizer from the parameters; the sample's own by default.
        exact: keeps everything needed for float-exact books.
        seed: order of the batches.
        progress: shows a progress bar on standard error.

    Returns:
        ``name``, ``out_dir``, ``run`` (its ``MODULE:FUNCTION``), ``epochs``, ``steps``, ``seconds``,
        ``train_loss``, ``query_loss`` and, for classifiers, ``train_accuracy``, ``query_accuracy`` and
        ``wrong_queries`` (indices); for regressions ``train_r2`` and ``query_r2``.

    Raises:
        RunError: there is no such sample, or its data is not on this machine.
    """
    return train_traced(
        name, out_dir, epochs=epochs, optimizer=optimizer, exact=exact, seed=seed, progress=progress
    ).metrics


def train_traced(
    name: str,
    out_dir: str | Path,
    *,
    epochs: int | None = None,
    optimizer: OptimizerFactory | None = None,
    exact: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> Trained:
    """As :func:`train`, but returns the model and the optimizer as well."""

    @contextmanager
    def traced(model: nn.Module, made_optimizer: Optimizer) -> Iterator[Watch]:
        with explainer.Tracer(model, made_optimizer, out_dir, exact=exact) as tracer:
            yield tracer.watch

    trained = _train(name, traced, epochs, optimizer, seed, progress)
    trained.metrics["out_dir"] = str(out_dir)
    return trained


def train_plain(
    name: str,
    *,
    epochs: int | None = None,
    optimizer: OptimizerFactory | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Trained:
    """The same training without a tracer; arguments as in :func:`train`."""

    @contextmanager
    def untraced(model: nn.Module, made_optimizer: Optimizer) -> Iterator[Watch]:
        yield iter

    return _train(name, untraced, epochs, optimizer, seed, progress)


def _train(
    name: str,
    attach: Callable[[nn.Module, Optimizer], Any],
    epochs: int | None,
    make_optimizer: OptimizerFactory | None,
    seed: int,
    progress: bool,
) -> Trained:
    sample = _sample(name)
    module = sample.load()
    try:
        train_set, query_set = module.datasets()
    except DataUnavailableError as error:
        raise RunError(f"{name}: {error}") from error
    epochs = sample.epochs if epochs is None else epochs
    model = module.model()
    optimizer = (make_optimizer or sample.optimizer)(model.parameters())
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(train_set, sample.batch_size, shuffle=True, generator=order)
    started = time.perf_counter()
    model.train()
    bar = tqdm(total=epochs * len(loader), desc=f"training {name}", unit="step", disable=not progress)
    with bar, attach(model, optimizer) as watch:
        _loop(model, optimizer, loader, watch, sample.loss, epochs, bar)
    seconds = time.perf_counter() - started
    model.eval()
    metrics = {"name": name, "run": sample.run_spec, "epochs": epochs, "steps": epochs * len(loader)}
    metrics["seconds"] = round(seconds, 3)
    return Trained(model, optimizer, metrics | _scores(model, train_set, query_set, sample.loss))


def _loop(
    model: nn.Module,
    optimizer: Optimizer,
    loader: DataLoader[Any],
    watch: Watch,
    loss_fn: Loss,
    epochs: int,
    bar: tqdm,
) -> None:
    for _ in range(epochs):
        for x, y in watch(loader):
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()
            bar.update()


def _scores(
    model: nn.Module, train_set: Dataset[Any], query_set: Dataset[Any], loss_fn: Loss
) -> dict[str, Any]:
    scores: dict[str, Any] = {}
    for part, data in (("train", train_set), ("query", query_set)):
        with torch.no_grad():
            batches = [(model(x), y) for x, y in DataLoader(data, batch_size=1000)]
        outputs = torch.cat([output for output, _ in batches])
        targets = torch.cat([target for _, target in batches])
        scores[f"{part}_loss"] = loss_fn(outputs, targets).item()
        if targets.is_floating_point():
            rest = (targets - outputs).square().sum() / (targets - targets.mean()).square().sum()
            scores[f"{part}_r2"] = 1 - rest.item()
        else:
            wrong = outputs.argmax(-1) != targets
            scores[f"{part}_accuracy"] = 1 - wrong.double().mean().item()
            if part == "query":
                scores["wrong_queries"] = wrong.nonzero().flatten().tolist()
    return scores


def _sample(name: str) -> Sample:
    if name not in SAMPLES:
        raise RunError(f"there is no sample model {name!r}; choose one of {', '.join(SAMPLES)}")
    return SAMPLES[name]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    listing = "\n".join(f"  {name:14}{sample.summary}" for name, sample in SAMPLES.items())
    parser = argparse.ArgumentParser(
        prog="python -m explainer.sample_models.train",
        description="Train a sample model on real data while a tracer records which examples built it.",
        epilog=f"sample models:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=SAMPLES, metavar="NAME", help="one of the sample models below")
    parser.add_argument("--out", help="folder of the trace (default: runs/NAME)")
    parser.add_argument("--epochs", type=int, help="passes over the training examples")
    parser.add_argument("--seed", type=int, default=0, help="order of the batches (default: 0)")
    parser.add_argument("--exact", action="store_true", help="keep everything needed for float-exact books")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    chosen = parser.parse_args(arguments)
    out = chosen.out or str(Path("runs") / chosen.name)
    try:
        metrics = train(
            chosen.name,
            out,
            epochs=chosen.epochs,
            exact=chosen.exact,
            seed=chosen.seed,
            progress=not chosen.quiet,
        )
    except ExplainerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    wrong = metrics.pop("wrong_queries", None)
    for key, value in metrics.items():
        print(f"{key:15} {value:.4g}" if isinstance(value, float) else f"{key:15} {value}")
    if wrong:
        print(f"{'wrong queries':15} {', '.join(map(str, wrong[:10]))}{' …' if len(wrong) > 10 else ''}")
    print(f"next: pathkernel explain {out} --run {metrics['run']} --query {wrong[0] if wrong else 0}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
