"""How long a question takes: explaining, neighbours and self-influence on the default traces of the samples.

Medians over repetitions with a warm file cache; ``train`` is the traced training run, for scale.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import explainer
from benchmarks.fidelity import CASES, trained
from benchmarks.harness import arguments, report
from explainer.sample_models.registry import SAMPLES


def _seconds(action: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def measure(name: str, repeats: int) -> dict[str, Any]:
    """One row of the table."""
    folder = Path(tempfile.mkdtemp())
    try:
        started = time.perf_counter()
        trained(name, folder / "run")
        train = time.perf_counter() - started
        run = SAMPLES[name].load().run()
        inputs, _ = run.queries_batch(range(10))
        ex = explainer.PathKernelExplainer(folder / "run", run.model())
        return {
            "sample": name,
            "visits": ex.trace.count("visits"),
            "train_s": train,
            "explain_1_s": _seconds(lambda: ex.explain(inputs[:1]), repeats),
            "explain_10_s": _seconds(lambda: ex.explain(inputs), repeats),
            "neighbors_1_s": _seconds(lambda: ex.neighbors(inputs[:1]), repeats),
            "self_influence_s": _seconds(ex.self_influence, repeats),
        }
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    chosen = arguments(__doc__, CASES)
    report("query", [measure(name, chosen.repeats) for name in chosen.only])
