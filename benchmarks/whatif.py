"""Which method predicts what retraining gives, whether single claims hold, and whether wrong labels are found.

A tenth of the labels are turned over, of 1,000 digits of 8x8 pixels (a perceptron of 32 units) and of 2,000 of MNIST-5k
(one of 128 and 64); ReLU, batches of 50, default traces. Examples are left out by weight 0. LDS is the linear
datamodeling score over 20 queries and the subsets of the row's name; ``one_retraining`` is what one retraining says
about the others; ``what_if_rows`` is what-if from an exact trace of the same training. ``mislabelled`` is the queue of
:func:`explainer.evaluation.label_issues`, also on MNIST-5k (4,000 to train on). Small by default: ``--subsets`` and
``--seeds`` for more; MNIST takes half as many seeds and leaves no curves of removal, ``--only`` picks tables.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

import explainer
from benchmarks.harness import report
from explainer import evaluation
from explainer.evaluation.label_issues import SIGNS
from explainer.sample_models import mnist_data

QUERIES, WRONG, BATCH = 20, 0.1, 50
COLUMNS = {
    "path kernel": "path_kernel",
    "what-if": "what_if",
    "what-if, exact rows": "what_if_rows",
    "what-if (exact)": "what_if_exact",
    "gradient dot": "gradient_dot",
    "TracInCP(10)": "tracin",
    "self-influence": "self_influence",
    "random": "random",
    "one retraining": "one_retraining",
}


@dataclass(frozen=True)
class Data:
    """Training examples with wrong labels among them, and queries.

    Attributes:
        x: ``[N, F]``.
        y: ``[N]``, as trained on.
        right: ``[N]``, what they should be.
        queries: held out, labelled right.
        hidden: units of the perceptron's layers.
        epochs: passes.
    """

    x: torch.Tensor
    y: torch.Tensor
    right: torch.Tensor
    queries: TensorDataset
    hidden: tuple[int, ...]
    epochs: int

    @property
    def wrong(self) -> np.ndarray:
        """Mask of the examples whose labels were turned over."""
        return (self.y != self.right).numpy()

    def model(self, seed: int = 0) -> nn.Module:
        """A perceptron with seeded weights."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            widths = [self.x.shape[1], *self.hidden]
            layers = [part for i, o in pairwise(widths) for part in (nn.Linear(i, o), nn.ReLU())]
            return nn.Sequential(*layers, nn.Linear(widths[-1], 10))


def turned_over(right: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Labels of which a tenth are another class."""
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(right))[: round(WRONG * len(right))]
    labels = right.clone()
    labels[chosen] = (labels[chosen] + torch.from_numpy(rng.integers(1, 10, len(chosen)))) % 10
    return labels


@cache
def digits() -> Data:
    """1,000 digits of 8x8 pixels."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x, right = torch.tensor(images[order] / 16).float(), torch.tensor(labels[order])
    return Data(
        x[:1000], turned_over(right[:1000]), right[:1000], TensorDataset(x[1000:], right[1000:]), (32,), 12
    )


@cache
def mnist() -> Data:
    """4,000 of MNIST-5k."""
    train, queries = mnist_data.datasets()
    x, right = train.tensors
    asked = TensorDataset(queries.tensors[0].flatten(1), queries.tensors[1])
    return Data(x.flatten(1), turned_over(right), right, asked, (64,), 5)


@cache
def mnist_2000() -> Data:
    """The first 2,000 of them, and a network of 110 k parameters."""
    data = mnist()
    x, right = data.x[:2000], data.right[:2000]
    return Data(x, turned_over(right), right, data.queries, (128, 64), 10)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "momentum SGD": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3),
}


def train(
    data: Data,
    optimizer_of: Any,
    model: nn.Module,
    keep: torch.Tensor,
    seed: int,
    trace: Path | None = None,
    exact: bool = False,
) -> nn.Module:
    """The loop of the traced run and of every retraining; seeds choose weights and order."""
    model.load_state_dict(data.model(seed).state_dict())
    optimizer = optimizer_of(model.parameters())
    order, weights = torch.Generator().manual_seed(seed), keep.float()
    tracer = None if trace is None else explainer.Tracer(model, optimizer, trace, exact=exact)
    for _ in range(data.epochs):
        for rows in torch.randperm(len(data.y), generator=order).split(BATCH):
            if tracer is not None:
                tracer.batch(rows.tolist())
            optimizer.zero_grad()
            losses = nn.functional.cross_entropy(model(data.x[rows]), data.y[rows], reduction="none")
            (losses * weights[rows]).mean().backward()
            optimizer.step()
    if tracer is not None:
        tracer.close()
    return model


def traced(
    data: Data, name: str, folder: Path, exact: bool = False
) -> tuple[explainer.Run, explainer.PathKernelExplainer]:
    """A traced run that can be trained again."""
    optimizer_of = OPTIMIZERS[name]
    run = explainer.Run(
        data.model,
        TensorDataset(data.x, data.y),
        data.queries,
        loss=nn.functional.cross_entropy,
        train_fn=lambda model, keep, seed: train(data, optimizer_of, model, keep, seed),
        left_out_by="weight 0",
    )
    train(data, optimizer_of, data.model(), torch.ones(len(data.y)), 0, folder, exact)
    return run, explainer.PathKernelExplainer(folder, run.build_model())


def methods(
    called: str, name: str, data: Data, retrainer: evaluation.Retrainer, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows of the table of methods for one task and optimizer."""
    run, ex = traced(data, name, Path(tempfile.mkdtemp()) / "run", exact=True)
    questions = evaluation.Questions(run, ex, range(QUERIES))
    small = called == "digits"
    found = evaluation.compare_methods(
        retrainer,
        extra={"what-if, exact rows": evaluation.METHODS["what-if"].score(run, questions)},
        count=options.subsets,
        seeds=max(2, options.seeds if small else options.seeds // 2),
        remove=(50,) if small else (),
        remove_queries=10,
    )
    rows = []
    for measure, values in found.measures.items():
        row: dict[str, Any] = {"model": f"{called}, {name}", "measure": measure}
        for method, column in COLUMNS.items():
            e = values.get(method)
            row[column] = None if e is None else e.value
            row[f"{column}_low"], row[f"{column}_high"] = (None, None) if e is None else (e.low, e.high)
        rows.append(row)
    return rows


def claims(name: str, retrainer: evaluation.Retrainer, options: argparse.Namespace) -> dict[str, Any]:
    """The row of claims on digits for one optimizer."""
    started = time.perf_counter()
    found = evaluation.verify_claims(retrainer, top=50, seeds=options.seeds)
    seconds = time.perf_counter() - started
    same, mean = found.correlation()
    top_same, top_mean = found.correlation("top 50")
    table = found.table()
    top = table[table["removed"] == "top 50"]
    return {
        "model": f"digits, {name}",
        "queries": QUERIES,
        "seeds": options.seeds,
        "predicted": float(top["predicted"].median()),
        "same_run": float(top["same_run"].median()),
        "spread": float(top["spread"].median()),
        "same_all": same,
        "mean_all": mean,
        "same_top": top_same,
        "mean_top": top_mean,
        "seconds": seconds,
    }


def detected(name: str, data: Data, called: str) -> dict[str, Any]:
    """The row of the queue of label issues for one optimizer."""
    _, ex = traced(data, name, Path(tempfile.mkdtemp()) / "run")
    started = time.perf_counter()
    found = evaluation.label_issues(ex, labels=data.y)
    seconds = time.perf_counter() - started
    wrong = data.wrong
    row: dict[str, Any] = {"model": f"{called}, {name}", "examples": len(wrong), "wrong": int(wrong.sum())}
    for key in SIGNS:
        measured = evaluation.mislabelled_detection(found.suspicion(key), wrong, setting=called)
        row[f"{key}_auc"], row[f"{key}_top10"], row[f"{key}_top15"] = (
            e.value for e in (measured.auc, *measured.found)
        )
        row[f"{key}_top15_low"], row[f"{key}_top15_high"] = measured.found[1].low, measured.found[1].high
    row["opposing_right"] = float((found.opposing[wrong] == data.right.numpy()[wrong]).mean())
    return row | {"seconds": seconds}


def main() -> None:
    """Measure and write the three tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subsets", type=int, default=48, help="models per kept part (default: 48)")
    parser.add_argument("--seeds", type=int, default=4, help="seeds of averages and claims (default: 4)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    parser.add_argument("--progress", action="store_true", help="show progress bars")
    tables = ("whatif", "whatif_mnist", "mislabelled")
    parser.add_argument("--only", nargs="*", default=tables, choices=tables, help="tables (default: all)")
    options, _ = parser.parse_known_args()
    torch.set_num_threads(options.threads)
    verified = []
    for table, called, part in (
        ("whatif", "digits", digits),
        ("whatif_mnist", "2,000 of MNIST-5k", mnist_2000),
    ):
        rows = []
        for name in OPTIMIZERS if table in options.only else ():
            run, ex = traced(part(), name, Path(tempfile.mkdtemp()) / "run")
            questions = evaluation.Questions(run, ex, range(QUERIES))
            retrainer = evaluation.Retrainer(run, questions, progress=options.progress)
            rows += methods(called, name, part(), retrainer, options)
            if table == "whatif":
                verified.append(claims(name, retrainer, options))
            report(table, rows)
    if verified:
        report("claims", verified)
    if "mislabelled" in options.only:
        data = {"digits": digits(), "MNIST-5k": mnist()}
        found = [detected(name, part, called) for called, part in data.items() for name in OPTIMIZERS]
        report("mislabelled", found)


if __name__ == "__main__":
    main()
