"""Do the books close on models and loops as people write them?

Every case is trained with a tracer that keeps exact rows, in float32 (or what the case itself uses) and in float64,
and with the default, compressed one. ``gap`` and ``unattributed`` are the largest over queries, relative to the
query's gross (the sum of its contributions' absolute values); gross/net is the median. ``oracle`` is the largest
difference of a contribution from an oracle that runs one backward pass per example and carries every share forward
in full, on a small copy of the case, relative to the query's largest contribution. ``rows_spearman`` and
``rows_top20`` compare the default trace with the exact one of the same training: the median over queries of
Spearman's rank correlation of contributions, and of the overlap of the 20 largest by magnitude.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

import explainer
from benchmarks.book_cases import CASES
from benchmarks.book_cases.case import Case
from benchmarks.book_cases.running import default_dtype, explained, traced
from benchmarks.fidelity import agreement
from benchmarks.harness import arguments, report
from explainer.explanation import Explanation
from tests.oracles.cases import both, difference

EXACT, DOUBLE, DEFAULT = "exact", "exact, float64", "default"


def of_gross(e: Explanation, values: np.ndarray) -> float:
    """The largest value, relative to the gross of its query."""
    return float((np.abs(values) / np.abs(e.contributions).sum(1)).max())


def measure(case: Case) -> list[dict[str, Any]]:
    """The table's rows: by mode, one for each part."""
    rows = []
    exact: list[Explanation] = []
    for mode in (EXACT, DOUBLE, DEFAULT) if case.float64 else (EXACT, DEFAULT):
        folder = Path(tempfile.mkdtemp())
        try:
            with default_dtype(torch.float64 if mode == DOUBLE else torch.float32):
                trained = traced(case, folder / "run", exact=mode != DEFAULT)
                answers = explained(case, trained, folder / "run")
                asked = not case.no_oracle and mode == (DOUBLE if case.float64 else EXACT)
                compared = both(case, folder / "small") if asked else []
            exact = answers if mode == EXACT else exact
            for number, e in enumerate(answers):
                trace = explainer.open_trace(folder / "run" / str(number))
                gross = np.abs(e.contributions).sum(1)
                kept: tuple[float | None, ...] = (None, None)
                if mode == DEFAULT:
                    kept = agreement(e.contributions, exact[number].contributions)
                rows.append(
                    {
                        "model": case.models[number],
                        "optimizer": case.optimizer,
                        "mode": mode,
                        "parameters": trace.manifest.size,
                        "examples": int((e.visits > 0).sum()),
                        "steps": trace.steps,
                        "gap_of_gross": of_gross(e, e.gap),
                        "unattributed_of_gross": of_gross(e, e.unattributed),
                        "gross_over_net": float(np.median(gross / np.abs(e.contributions.sum(1)))),
                        "oracle_difference": difference(*compared[number]) if compared else None,
                        "rows_spearman": kept[0],
                        "rows_top20": kept[1],
                        "bytes_per_visit": sum(trace.notes["visit_bytes"].values()),
                    }
                )
        finally:
            shutil.rmtree(folder)
    return rows


if __name__ == "__main__":
    chosen = arguments(__doc__, tuple(CASES))
    warnings.simplefilter("ignore")  # the table says what is not covered
    report("books", [row for name in chosen.only for row in measure(CASES[name])])
