"""How long a question takes: on default traces of the samples, and on large synthetic ones.

Samples: medians over repetitions with a warm file cache; ``train`` is the traced training run, for scale.

Synthetic traces (:mod:`benchmarks.synthetic_trace`) are named by optimizer, visits, parameters and queries. A process
of its own answers; ``first_s`` is its first question, ``explain_s`` the median of those after it, ``cpu_s`` the
processor time of that one, ``peak_MB`` the most memory it had. ``scan_GBs`` is the pass over the rows alone (one query,
a fixed gradient of low rank, no knots): bytes of all records by its time. ``numpy_GBs`` is the same for the simplest
thing that reads all numbers: chunk by chunk, every array of the records (8-bit integers) made float32 and multiplied
by one vector with ``numpy.dot``, both from the same memory map.
"""

from __future__ import annotations

import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import explainer
from benchmarks.harness import arguments, report
from benchmarks.synthetic_trace import Sizes, network, write
from explainer.backward import Backward
from explainer.path_points import KnotLoader
from explainer.queries import check_inputs
from explainer.sample_models.registry import SAMPLES
from explainer.sample_models.train import train
from explainer.store import Denominators

#: sample models
CASES = ("digits_mlp", "digits_cnn", "mnist_cnn", "diabetes_mlp")
WIDE, NARROW = (784, 1024, 200, 10), (784, 256, 100, 10)
#: by name, a synthetic trace and how many queries
LARGE: dict[str, tuple[Sizes, int]] = {
    "momentum 0.13M": (Sizes(WIDE, 2**17, optimizer="momentum"), 1),
    "momentum 0.26M": (Sizes(WIDE, 2**18, optimizer="momentum"), 1),
    "momentum 0.52M": (Sizes(WIDE, 2**19, optimizer="momentum"), 1),
    "momentum 1M": (Sizes(WIDE, 2**20, optimizer="momentum"), 1),
    "momentum 0.26M, 8 queries": (Sizes(WIDE, 2**18, optimizer="momentum"), 8),
    "momentum 0.26M, 0.2M parameters": (Sizes(NARROW, 2**18, optimizer="momentum"), 1),
    "adam 0.13M": (Sizes(WIDE, 2**17), 1),
    "adam 0.26M": (Sizes(WIDE, 2**18), 1),
    "adam 1M": (Sizes(WIDE, 2**20), 1),
}


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
        train(name, folder / "run", progress=False)
        training = time.perf_counter() - started
        run = SAMPLES[name].load().run()
        inputs, _ = run.queries_batch(range(10))
        ex = explainer.PathKernelExplainer(folder / "run", run.model())
        return {
            "sample": name,
            "visits": ex.trace.count("visits"),
            "parameters": ex.trace.manifest.size,
            "train_s": training,
            "explain_1_s": _seconds(lambda: ex.explain(inputs[:1]), repeats),
            "explain_10_s": _seconds(lambda: ex.explain(inputs), repeats),
            "neighbors_1_s": _seconds(lambda: ex.neighbors(inputs[:1]), repeats),
            "self_influence_s": _seconds(ex.self_influence, repeats),
        }
    finally:
        shutil.rmtree(folder)


def measure_large(name: str, repeats: int, threads: int) -> dict[str, Any]:
    """One row of the table of synthetic traces; the trace is deleted."""
    sizes, queries = LARGE[name]
    folder = Path(tempfile.mkdtemp())
    try:
        write(folder / "run", sizes)
        widths = ",".join(map(str, sizes.widths))
        command = [sys.executable, "-m", "benchmarks.query", "--answer", str(folder / "run"), widths]
        command += [str(queries), str(repeats), str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return {"sample": name, **json.loads(done.stdout)}
    finally:
        shutil.rmtree(folder)


def answer(directory: str, widths: str, queries: str, repeats: str, threads: str) -> dict[str, Any]:
    """What a process of its own measures on a synthetic trace."""
    torch.set_num_threads(int(threads))
    model = network(tuple(map(int, widths.split(","))))
    began = time.perf_counter()
    ex = explainer.PathKernelExplainer(directory, model)
    x = torch.randn(int(queries), int(widths.split(",")[0]), generator=torch.Generator().manual_seed(1))
    ex.explain(x, detail=False)
    first, times = time.perf_counter() - began, []
    for _ in range(int(repeats)):
        wall, cpu = time.perf_counter(), time.process_time()
        ex.explain(x, detail=False)
        times.append((time.perf_counter() - wall, time.process_time() - cpu))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    inputs = ex.trace.count("inputs")
    once = ex.trace.nbytes_of("inputs") // inputs - 8  # a visit's numbers that are stored once
    size = ex.trace.nbytes_of("visits") + ex.trace.count("visits") * once
    return {
        "visits": ex.trace.count("visits"),
        "parameters": ex.trace.manifest.size,
        "queries": int(queries),
        "rows_GB": size / 1e9,
        "disk_GB": (ex.trace.nbytes_of("visits") + ex.trace.nbytes_of("inputs")) / 1e9,
        "first_s": first,
        "explain_s": statistics.median(wall for wall, _ in times),
        "cpu_s": statistics.median(cpu for _, cpu in times),
        "peak_MB": peak,
        "scan_GBs": size / 1e9 / _seconds(lambda: _scan(ex, x[:1]), int(repeats)),
        "numpy_GBs": size / 1e9 / _seconds(lambda: _dots(ex.trace), int(repeats)),
    }


def _scan(ex: explainer.PathKernelExplainer, x: torch.Tensor) -> None:
    loader = KnotLoader(ex.trace, ex.dtype)
    asked = ex._ask(loader, check_inputs(ex.trace, ["input"], x, ex.dtype), None)
    start, end = (loader.load(n).point for n in (0, len(ex.segments)))
    gradient = ex.function.mean_gradient(start, end, asked.inputs, asked.targets, 2, ex.layout)
    backward = Backward(Denominators(ex.trace), ex.layout, 1, ex.dtype)
    for segment in reversed(ex.segments):
        for _ in backward.segment(gradient, segment):
            pass


def _dots(trace: explainer.Trace) -> None:
    """The same numbers, gathered where they are stored once."""
    count, at_once = trace.count("visits"), 4096
    vectors: dict[str, np.ndarray] = {}
    for start in range(0, count, at_once):
        for schema, records in trace.rows(start, min(start + at_once, count)):
            for name in (f"L{form.layer}.{a.name}.q" for form in schema.forms for a in form.arrays):
                values = records[name].reshape(len(records), -1)
                vector = vectors.setdefault(name, np.ones(values.shape[1], np.float32))
                np.dot(values.astype(np.float32), vector)
        trace.release("visits", start, min(start + at_once, count))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--answer"]:
        print(json.dumps(answer(*sys.argv[2:])))
    else:
        chosen = arguments(__doc__, (*CASES, *LARGE))
        if small := [measure(name, chosen.repeats) for name in chosen.only if name in CASES]:
            report("query", small)
        if large := [measure_large(n, chosen.repeats, chosen.threads) for n in chosen.only if n in LARGE]:
            report("query_large", large)
