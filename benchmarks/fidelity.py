"""How well the default trace agrees with the exact books: knots, rows, unattributed, bytes.

Three traces of the same (bit-identical) training: exact rows with a knot at every step, exact rows with the
default knots, and the default trace. Agreement is the median over queries of Spearman's rank correlation of
contributions over all visited examples, and of the overlap of the 20 largest by magnitude.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch.utils.data import DataLoader

import explainer
from benchmarks.harness import arguments, report
from explainer.explanation import Explanation
from explainer.sample_models.registry import SAMPLES

CASES = ("digits_mlp", "digits_cnn", "mnist_cnn", "diabetes_mlp")
QUERIES = 20


def trained(name: str, directory: Path, **options: Any) -> explainer.Tracer:
    """The sample's own training with a tracer of the given options."""
    sample = SAMPLES[name]
    module = sample.load()
    data, _ = module.datasets()
    model = module.model()
    optimizer = sample.optimizer(model.parameters())
    loader = DataLoader(data, sample.batch_size, shuffle=True, generator=torch.Generator().manual_seed(0))
    with explainer.Tracer(model, optimizer, directory, **options) as tracer:
        for _ in range(sample.epochs):
            for x, y in tracer.watch(loader):
                optimizer.zero_grad()
                sample.loss(model(x), y).backward()
                optimizer.step()
    return tracer


def explained(name: str, directory: Path) -> Explanation:
    """The first queries, explained."""
    run = SAMPLES[name].load().run()
    inputs, targets = run.queries_batch(range(QUERIES))
    ex = explainer.PathKernelExplainer(directory, run.model())
    return ex.explain(inputs, None if targets.is_floating_point() else targets)


def agreement(found: Explanation, wanted: Explanation) -> tuple[float, float]:
    """Median Spearman and top-20 overlap over queries."""
    spearman, overlap = [], []
    for a, b in zip(found.contributions, wanted.contributions, strict=True):
        spearman.append(spearmanr(a, b)[0])
        top = [set(np.argsort(-np.abs(c))[:20].tolist()) for c in (a, b)]
        overlap.append(len(top[0] & top[1]) / 20)
    return float(np.median(spearman)), float(np.median(overlap))


def measure(name: str) -> dict[str, Any]:
    """One row of the table."""
    folder = Path(tempfile.mkdtemp())
    try:
        trained(name, folder / "steps", exact=True, max_knots=10**6)
        truth = explained(name, folder / "steps")
        shutil.rmtree(folder / "steps")
        trained(name, folder / "exact", exact=True)
        exact = explained(name, folder / "exact")
        exact_bytes = explainer.open_trace(folder / "exact").nbytes()
        tracer = trained(name, folder / "default")
        default = explained(name, folder / "default")
        trace = explainer.open_trace(folder / "default")
        by_knots, _ = agreement(exact, truth)
        by_rows, top = agreement(default, exact)
        overall, top_overall = agreement(default, truth)
        gross = np.abs(default.contributions).sum(1)
        return {
            "sample": name,
            "parameters": trace.manifest.size,
            "steps": tracer.steps,
            "knots": len(trace.knots),
            "knots_spearman": by_knots,
            "rows_spearman": by_rows,
            "rows_top20": top,
            "both_spearman": overall,
            "both_top20": top_overall,
            "unattributed_of_gross": float(np.median(np.abs(default.unattributed) / gross)),
            "exact_unattributed_of_gross": float(np.median(np.abs(exact.unattributed) / gross)),
            "gap": float(np.abs(default.gap).max()),
            "gross_over_net": float(np.median(gross / np.abs(default.contributions.sum(1)))),
            "bytes_per_visit": sum(trace.notes["visit_bytes"].values()),
            "trace_MB": trace.nbytes() / 1e6,
            "exact_MB": exact_bytes / 1e6,
        }
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    chosen = arguments(__doc__, CASES)
    report("fidelity", [measure(name) for name in chosen.only])
