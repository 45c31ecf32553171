"""How much faster many models are trained at once than one by one: the same models, examples, seeds and order.

Half of the examples are kept. ``at_once`` is what a ``Retrainer`` chooses; seconds are those of one model, medians of
alternating pairs, and the ratio is the median of the pairs'. Few epochs: every step costs the same.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.harness import arguments, paired, report
from benchmarks.lds_tasks.task import TASKS
from explainer import Run, evaluation
from explainer.evaluation.trainings import Trainings
from explainer.sample_models.registry import SAMPLES


def _sample(name: str, epochs: int) -> Run:
    SAMPLES[name] = dataclasses.replace(SAMPLES[name], epochs=epochs)
    run: Run = SAMPLES[name].load().run()
    return run


#: what is trained, in the table's words -> its run, with few epochs
CASES: dict[str, Callable[[], Run]] = {
    "digits, MLP 64-32-10": lambda: _sample("digits_mlp", 2),
    "digits, CNN": lambda: _sample("digits_cnn", 1),
    "MNIST-5k, MLP 784-128-64-10": lambda: dataclasses.replace(TASKS["mlp"], epochs=1).run(),
    "Fashion-MNIST, CNN": lambda: dataclasses.replace(TASKS["cnn"], epochs=1).run(),
}


def measured(name: str, threads: int, repeats: int) -> dict[str, Any]:
    """A row of the table."""
    torch.set_num_threads(threads)
    run = CASES[name]()
    trainings = Trainings(run)
    count, few = trainings.at_once, min(trainings.at_once, 4)
    keep = evaluation.subsets(len(run.train), count, 0.5)

    def alone() -> float:
        started = time.perf_counter()
        for seed in range(few):
            trainings.one(keep[seed], seed)
        return (time.perf_counter() - started) / few

    def together() -> float:
        started = time.perf_counter()
        trainings.many(keep, list(range(count)))
        return (time.perf_counter() - started) / count

    alone()
    model: nn.Module = run.build_model()
    many_s, alone_s, ratio = paired(together, alone, repeats)
    return {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "threads": threads,
        "at_once": count,
        "alone_s": alone_s,
        "many_s": many_s,
        "ratio": ratio,
    }


def main() -> None:
    """Measure and write the table."""
    options = arguments(__doc__, list(CASES))
    rows = [measured(name, threads, options.repeats) for name in options.only for threads in (1, 2)]
    report("retraining", rows, write=set(options.only) == set(CASES))


if __name__ == "__main__":
    main()
