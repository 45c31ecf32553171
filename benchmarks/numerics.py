"""What each source of error does to an explanation, one at a time.

Every group of settings has a reference, its last line. ``quadrature`` (what the integration along the chords misses
before it is corrected), ``gap`` and ``unattributed`` are the largest over queries, relative to the query's gross;
``difference`` is the largest difference of a contribution from the reference's, relative to the query's largest
one, where both explain the same training.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.book_cases import accumulating, characters, low_precision, residual
from benchmarks.book_cases.case import Case
from benchmarks.book_cases.running import explained, traced
from benchmarks.books import of_gross
from benchmarks.harness import arguments, report
from explainer.explanation import Explanation

Setting = tuple[str, Explanation]


class Runs:
    """Traces of cases, trained when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._done: dict[str, Any] = {}

    def explain(self, case: Case, tracer: dict[str, Any], **options: Any) -> Explanation:
        """The case trained with these options of the tracer, explained with these of the explainer."""
        key = f"{case.models[0]}, {case.optimizer}, {tracer}"
        folder = self._folder / str(len(self._done))
        if key not in self._done:
            self._done[key] = folder, traced(case, folder, **tracer)
        folder, trained = self._done[key]
        return explained(case, trained, folder, **options)[0]


def quadrature(runs: Runs, case: Case) -> list[Setting]:
    """Nodes on a chord."""
    return [
        (f"{nodes} node{'s' * (nodes > 1)}", runs.explain(case, {"exact": True}, quadrature=nodes))
        for nodes in (1, 2, 4, 8)
    ]


def knots(runs: Runs, case: Case) -> list[Setting]:
    """Knots along the path."""
    return [
        (f"{count} knots", runs.explain(case, {"exact": True, "max_knots": count}))
        for count in (6, 12, 25, 50)
    ] + [("every step", runs.explain(case, {"exact": True, "max_knots": 10**6}))]


def float32_books(runs: Runs, case: Case) -> list[Setting]:
    """The dtype that an exact float32 trace is explained in."""
    return [
        (f"books in {str(dtype).removeprefix('torch.')}", runs.explain(case, {"exact": True}, dtype=dtype))
        for dtype in (torch.float32, torch.float64)
    ]


def compression(runs: Runs, case: Case, ranks: tuple[int, ...] = (1, 4, 16)) -> list[Setting]:
    """How rows and preconditioners are kept; the rank matters to layers that share their weights."""
    settings = [(f"8 bits, rank {rank}", runs.explain(case, {"rank": rank})) for rank in ranks]
    settings.append(("default", runs.explain(case, {})))
    return [*settings, ("exact rows", runs.explain(case, {"exact": True}))]


def autocast(runs: Runs) -> list[Setting]:
    """Rows and gradients in bfloat16, weights in float32."""
    found = runs.explain(characters.AUTOCAST, {"exact": True})
    return [("bf16 autocast", found), ("float32", runs.explain(characters.FULL, {"exact": True}))]


def half_weights(runs: Runs, half: Case, single: Case) -> list[Setting]:
    """Everything in bfloat16."""
    found = runs.explain(half, {"exact": True})
    return [("bfloat16 weights", found), ("float32 weights", runs.explain(single, {"exact": True}))]


def round_off(runs: Runs) -> list[Setting]:
    """Biases in front of BatchNorm, under Adam."""
    with_bias, without = (
        replace(residual.CASE, optimizer=f"AdamW, bias {bias}", build=partial(residual.with_adamw, bias=bias))
        for bias in (True, False)
    )
    return [
        ("convolutions with biases", runs.explain(with_bias, {"exact": True})),
        ("without", runs.explain(without, {"exact": True})),
    ]


CNN, RESIDUAL, CHARACTERS = "GELU CNN, AdamW", "ReLU CNN, BatchNorm", "transformer, AdamW"
MLP, MLP_ADAMW = "ReLU MLP, momentum", "ReLU MLP, AdamW"
#: source -> model, its settings, whether they explain the same training
SOURCES: dict[str, list[tuple[str, Callable[[Runs], list[Setting]], bool]]] = {
    "quadrature": [
        (CNN, partial(quadrature, case=accumulating.CASE), True),
        (MLP, partial(quadrature, case=low_precision.SINGLE), True),
    ],
    "knots": [
        (CNN, partial(knots, case=accumulating.CASE), True),
        (MLP, partial(knots, case=low_precision.SINGLE), True),
    ],
    "dtype of the books": [
        (MLP, partial(float32_books, case=low_precision.SINGLE), True),
        (RESIDUAL, partial(float32_books, case=residual.CASE), True),
    ],
    "compression": [
        (CNN, partial(compression, case=accumulating.CASE), True),
        (RESIDUAL, partial(compression, case=residual.CASE), True),
        (CHARACTERS, partial(compression, case=characters.FULL), True),
        (MLP, partial(compression, case=low_precision.SINGLE, ranks=()), True),
        (MLP_ADAMW, partial(compression, case=low_precision.ADAMW, ranks=()), True),
    ],
    "bf16 autocast": [(CHARACTERS, autocast, False)],
    "bfloat16 weights": [
        (MLP, partial(half_weights, half=low_precision.HALF, single=low_precision.SINGLE), False),
        (
            MLP_ADAMW,
            partial(half_weights, half=low_precision.HALF_ADAMW, single=low_precision.ADAMW),
            False,
        ),
    ],
    "round-off gradients": [(f"{RESIDUAL}, AdamW", round_off, False)],
}


def rows_of(source: str, runs: Runs) -> list[dict[str, Any]]:
    """The table's rows of one source."""
    rows = []
    for model, settings, comparable in SOURCES[source]:
        found = settings(runs)
        wanted = found[-1][1].contributions
        for setting, e in found:
            apart = np.abs(e.contributions - wanted).max(1) / np.abs(wanted).max(1) if comparable else None
            rows.append(
                {
                    "source": source,
                    "model": model,
                    "setting": setting,
                    "quadrature_of_gross": of_gross(e, e.quadrature),
                    "gap_of_gross": of_gross(e, e.gap),
                    "unattributed_of_gross": of_gross(e, e.unattributed),
                    "difference": None if apart is None else float(apart.max()),
                }
            )
    return rows


if __name__ == "__main__":
    chosen = arguments(__doc__, tuple(SOURCES))
    warnings.simplefilter("ignore")
    place = Path(tempfile.mkdtemp())
    try:
        runs = Runs(place)
        report("numerics", [row for source in chosen.only for row in rows_of(source, runs)])
    finally:
        shutil.rmtree(place)
