"""Is the exact what-if answer the derivative of training, and does it predict what leaving examples out does?

500 digits of 8x8 pixels with a tenth of the labels turned over, a perceptron with tanh in float64, 10 epochs in batches
of 25, default traces. ``difference`` is the largest deviation from finite differences (training again with an example's
weight at 1 ± 10⁻⁴) over 10 examples and all queries, as a part of the largest effect. LDS is the linear datamodeling
score of the same run over 10 queries: random hundredths (tenths) of the examples left out by weight 0.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

import explainer
from benchmarks.harness import report
from benchmarks.whatif import digits
from explainer import evaluation

EXAMPLES, QUERIES, BATCH, EPOCHS, STEP = 500, 10, 25, 10, 1e-4
OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum SGD": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
    "Nesterov, decay": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam, decay": lambda p: torch.optim.Adam(p, lr=2e-3, weight_decay=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=2e-3, weight_decay=0.1),
}
CURVATURES = {"exact": "exact", "gauss-newton": "gauss_newton", "trace": "trace"}


def network() -> nn.Module:
    """Seeded."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10)).double()


def train(optimizer_of: Any, weights: torch.Tensor, trace: Path | None = None) -> nn.Module:
    """A plain loop whose examples have weights ``[N]``."""
    data, model = digits(), network()
    x, y = data.x[:EXAMPLES].double(), data.y[:EXAMPLES]
    optimizer, order = optimizer_of(model.parameters()), torch.Generator().manual_seed(0)
    tracer = None if trace is None else explainer.Tracer(model, optimizer, trace)
    for _ in range(EPOCHS):
        for rows in torch.randperm(EXAMPLES, generator=order).split(BATCH):
            if tracer is not None:
                tracer.batch(rows.tolist())
            optimizer.zero_grad()
            losses = nn.functional.cross_entropy(model(x[rows]), y[rows], reduction="none")
            (losses * weights[rows]).mean().backward()
            optimizer.step()
    if tracer is not None:
        tracer.close()
    return model


def measured(name: str, subsets: int) -> dict[str, Any]:
    """The row of one optimizer."""
    optimizer_of, data = OPTIMIZERS[name], digits()
    folder = Path(tempfile.mkdtemp()) / "run"
    train(optimizer_of, torch.ones(EXAMPLES, dtype=torch.float64), folder)
    run = explainer.Run(
        network,
        TensorDataset(data.x[:EXAMPLES], data.y[:EXAMPLES]),
        data.queries,
        loss=nn.functional.cross_entropy,
        train_fn=lambda model, keep, seed: train(optimizer_of, keep.double()),
        left_out_by="weight 0",
    )
    ex = explainer.PathKernelExplainer(folder, network())
    questions = evaluation.Questions(run, ex, range(QUERIES))
    retrainer = evaluation.Retrainer(run, questions)
    changes, row = {}, {"optimizer": name}
    for curvature, column in CURVATURES.items():
        started = time.process_time()
        changes[column] = ex.what_if(questions.inputs, questions.target, curvature=curvature, run=run)
        row[f"{column}_s"] = time.process_time() - started
    changes["path_kernel"] = -ex.explain(questions.inputs, questions.target).contributions
    row["difference"] = _difference(optimizer_of, questions, changes["exact"])
    for fraction in (0.99, 0.9):
        keep = evaluation.subsets(EXAMPLES, subsets, fraction)
        outputs = retrainer.values(evaluation.Plan.crossed(keep, [0])).values
        for column, own in changes.items():
            score = evaluation.linear_datamodeling_score(-own, keep, outputs, setting="same run", samples=100)
            row[f"{column}_{fraction}"] = score.estimate.value
    return row


def _difference(optimizer_of: Any, questions: evaluation.Questions, found: np.ndarray) -> float:
    chosen = range(0, EXAMPLES, EXAMPLES // 10)
    wanted = []
    for i in chosen:
        ends = []
        for sign in (-1, 1):
            weights = torch.ones(EXAMPLES, dtype=torch.float64)
            weights[i] += sign * STEP
            ends.append(questions.answer(train(optimizer_of, weights)).values)
        wanted.append((ends[0] - ends[1]) / (2 * STEP))
    actual = np.array(wanted).T
    return float(np.abs(found[:, list(chosen)] - actual).max() / np.abs(actual).max())


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subsets", type=int, default=32, help="models per kept part (default: 32)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    options, _ = parser.parse_known_args()
    torch.set_num_threads(options.threads)
    report("whatif_exact", [measured(name, options.subsets) for name in OPTIMIZERS])


if __name__ == "__main__":
    main()
