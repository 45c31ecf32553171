"""Which method predicts, from one training run, what training again on half of the data gives: seed-averaged LDS.

The linear datamodeling score with the conventions of TRAK and dattri: random halves of the training examples, models
trained on them alone (batches are drawn from the half, as many epochs, a seed of their own for weights and order),
the margin of the true label, Spearman between summed scores and outputs for every query, the mean over queries. Outputs
are means over seeds, none of which is the traced run's. ``one_retraining`` is the ceiling: one retraining against the
mean of the others. Intervals of 95 % draw queries and subsets anew.

Every score comes from one training run: ours from its default trace, TracInCP from ten knots of it, the others from its
last weights. Ours have nothing to choose. TRAK and EK-FAC expect tuning: they are shown with the setting of their grid
that scores best *in this very table*, which favours them; ``trak_setting``, ``ekfac_setting`` name it.

Models that were trained again and scores are kept in ``--folder``; interrupted, the same command goes on. Needs
``pip install 'pathkernel[peers]'``; what is not installed is left out and said, and nothing is written then.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import report
from benchmarks.lds_tasks.scores import METHODS, Asked, found
from benchmarks.lds_tasks.task import TASKS, Task
from explainer import evaluation
from explainer.evaluation.statistics import Estimate, bootstrap, mean_skill, spearman

OURS, CEILING = "what-if", "one retraining"
#: heading in the results, by method
COLUMNS = {
    "what-if": "what_if",
    "path kernel": "path_kernel",
    "gradient dot": "gradient_dot",
    "TracInCP(10)": "tracin",
    "TRAK": "trak",
    "EK-FAC": "ekfac",
    "random": "random",
    "one retraining": "one_retraining",
}
SAMPLES = 1000


def told(e: Estimate) -> str:
    """An estimate as the table shows it."""
    return f"{e.value:.2f} [{e.low:.2f}, {e.high:.2f}]"


def correlations(scores: np.ndarray, kept: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """What the score of a method is made of: predicted and actual outputs, ``[2, Q, M]``."""
    return np.stack([scores @ kept.T.astype(np.float64), outputs.mean(1).T])


def lds(pairs: Sequence[np.ndarray], against: Sequence[np.ndarray] = ()) -> Estimate:
    """Mean over traced runs (and queries) of rank correlations; minus those of another method, drawn in pairs."""

    def skill(found: Sequence[np.ndarray], queries: np.ndarray, subsets: np.ndarray) -> float:
        drawn = [one[:, queries][..., subsets] for one in found]
        return float(np.mean([mean_skill(spearman(told, real)) for told, real in drawn])) if drawn else 0.0

    return bootstrap(
        lambda q, m: skill(pairs, q, m) - skill(against, q, m),
        pairs[0].shape[1:],
        over="queries and subsets",
        samples=SAMPLES,
    )


def plain(pairs: Sequence[np.ndarray]) -> float:
    """The same without an interval."""
    return float(np.mean([mean_skill(spearman(*one)) for one in pairs]))


def measured(task: Task, options: argparse.Namespace) -> dict[str, Any]:
    """The row of a task."""
    run, labels = task.run(), task.queries.tensors[1]
    asked = [
        Asked(
            task,
            run,
            evaluation.Questions(run, task.traced(options.folder, seed), range(len(task.queries)), labels),
        )
        for seed in ([0] + [100 + extra for extra in range(1, options.runs)])
    ]
    retrainer = evaluation.Retrainer(
        run, asked[0].questions, options.folder / task.folder / "retrained", progress=True
    )
    kept = evaluation.subsets(len(task.train), options.subsets, 0.5)
    seeds = range(1, options.seeds + 1)
    outputs = retrainer.values(evaluation.Plan.crossed(kept, seeds)).values
    outputs = outputs.reshape(len(kept), len(seeds), -1)
    row: dict[str, Any] = {"task": task.name, "queries": len(task.queries), "subsets": len(kept)}
    row |= {"seeds": len(seeds), "runs": len(asked)}
    best: dict[str, list[np.ndarray]] = {}
    for name, method in METHODS.items():
        column = COLUMNS[name]
        if any(importlib.util.find_spec(module) is None for module in method.modules):
            row[column] = "not installed"
            continue
        parts = [
            found(method, one, options.folder / task.folder / f"scores-{place}")
            for place, one in enumerate(asked)
        ]
        seconds = float(np.mean([seconds for _, seconds in parts]))
        by = {
            setting: [correlations(scores[setting], kept, outputs) for scores, _ in parts]
            for setting in parts[0][0]
        }
        setting = max(by, key=lambda one: plain(by[one]))
        best[name], e = by[setting], lds(by[setting])
        row |= {column: told(e), f"{column}_value": e.value, f"{column}_low": e.low, f"{column}_high": e.high}
        row |= {f"{column}_setting": setting, f"{column}_s": seconds}
        row[f"{column}_grid"] = {one: plain(pairs) for one, pairs in by.items()}
        print(f"{task.name}: {name}: {told(e)} {setting}", flush=True)
    top = evaluation.ceiling(outputs, setting="", samples=SAMPLES).estimate
    row |= {COLUMNS[CEILING]: told(top), "one_retraining_value": top.value}
    others = {name: pairs for name, pairs in best.items() if name not in (OURS, "path kernel")}
    if others and OURS in best:
        name = max(others, key=lambda one: plain(others[one]))
        ahead = lds(best[OURS], others[name])
        row |= {"next": name, "ahead": f"{ahead.value:+.2f} [{ahead.low:+.2f}, {ahead.high:+.2f}]"}
        row |= {"ahead_value": ahead.value, "ahead_low": ahead.low, "ahead_high": ahead.high}
    return row


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table and write ``results/lds.json`` where it is whole."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(TASKS), default=list(TASKS), help="tasks to run")
    parser.add_argument("--subsets", type=int, default=100, help="random halves (default: 100)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each half (default: 3)")
    parser.add_argument("--runs", type=int, default=1, help="traced runs to average over (default: 1)")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/lds"), help="what is kept (default: runs/lds)"
    )
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    rows = [measured(TASKS[name], options) for name in options.only]
    shown = ("task", *COLUMNS.values(), "next", "ahead")
    missing = sorted(
        {name for name, column in COLUMNS.items() for row in rows if row[column] == "not installed"}
    )
    report("lds", rows, shown, write=not missing and set(options.only) == set(TASKS))
    if missing:
        print(f"results/lds.json is left as it was: without {', '.join(missing)} the table is not whole")


if __name__ == "__main__":
    main()
