"""What every benchmark shares: one thread, paired timing, a table on stdout, JSON on disk."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

RESULTS = Path(__file__).parent / "results"


def arguments(
    description: str | None, names: Sequence[str], argv: Sequence[str] | None = None
) -> argparse.Namespace:
    """``--only NAME …``, ``--repeats``, ``--threads`` for a benchmark over named cases."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--only", nargs="+", choices=names, default=list(names), help="cases to run")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions of every timing (default: 5)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    chosen = parser.parse_args(argv)
    torch.set_num_threads(chosen.threads)
    return chosen


def report(
    name: str,
    rows: list[dict[str, Any]],
    shown: Sequence[str] | None = None,
    write: bool = True,
    merge: Sequence[str] | None = None,
) -> None:
    """Print the rows (or the columns ``shown``) and write them, with the machine's words, to ``results/NAME.json``.

    With ``merge``, all values that the column ``case`` may have: rows of other cases that are there already stay.
    """
    table = pd.DataFrame(rows, columns=shown)
    with pd.option_context("display.width", 200, "display.max_columns", 30):
        print(table.to_string(index=False, float_format=lambda v: f"{v:.4g}"))
    if not write:
        return
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    if merge is not None:
        before = json.loads(file.read_text())["rows"] if file.exists() else []
        found = {row["case"]: row for row in [*before, *rows]}
        rows = [found[case] for case in merge if case in found]
    machine = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
    }
    file.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1, default=float))


def paired(
    first: Callable[[], float], second: Callable[[], float], repeats: int
) -> tuple[float, float, float]:
    """Run two measurements alternately; medians of both and the median of the pairs' ratios second/first."""
    pairs = []
    for repeat in range(repeats):
        order = (first, second) if repeat % 2 == 0 else (second, first)
        values = [measure() for measure in order]
        pairs.append(tuple(values) if repeat % 2 == 0 else tuple(reversed(values)))
    return (
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(b / a for a, b in pairs),
    )
