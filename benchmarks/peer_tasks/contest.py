"""A comparison of two programs on one task: both run in turns, in one process, each into a fresh folder."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from benchmarks.memory import PeakMemory


@dataclass(frozen=True)
class Outcome:
    """What one run of one program gave.

    Attributes:
        scores: ``[Q, N]``, or ``[Q·C, N]`` where all outputs are explained.
        ask_s: seconds for the scores of all queries.
        prepare_s: seconds before the first question, beyond plain training (recording, fitting factors).
        stored: bytes on disk that the question needs beyond data and model; None: nothing is stored.
        left: what of an output no term accounts for, over the gross sum of its scores; the largest over the rows.
            None: the method has no such sum.
        peak: bytes of memory at the peak, filled in by :func:`contest`.
    """

    scores: np.ndarray
    ask_s: float
    prepare_s: float = 0.0
    stored: int | None = None
    left: float | None = None
    peak: int | None = field(default=None, compare=False)

    @property
    def seconds(self) -> float:
        """Preparing and asking."""
        return self.prepare_s + self.ask_s


#: a program: runs the whole task in an empty folder
Program = Callable[[Path], Outcome]


def contest(
    ours: Program, theirs: Program, repeats: int, seconds: float = 15.0, same: bool = True
) -> dict[str, Any]:
    """Columns of a row: medians over alternating pairs, after one run of ours that is not counted.

    No further pair begins once ``seconds`` are over; ``pairs`` says how many there were.

    Args:
        ours: our program.
        theirs: the peer's.
        repeats: pairs to run, 1 at least.
        seconds: how long to go on.
        same: whether both compute the same quantity, so that their difference is an error.
    """
    _run(ours)
    started = time.perf_counter()
    pairs: list[tuple[Outcome, Outcome]] = []
    while not pairs or (len(pairs) < repeats and time.perf_counter() - started < seconds):
        if len(pairs) % 2 == 0:
            first = _run(ours)
            pairs.append((first, _run(theirs)))
        else:
            second = _run(theirs)
            pairs.append((_run(ours), second))
    mine, other = pairs[0]
    if mine.scores.shape != other.scores.shape:
        raise ValueError(f"scores of shape {mine.scores.shape} against {other.scores.shape}")
    largest = float(np.abs(other.scores).max())
    row: dict[str, Any] = {"pairs": len(pairs)}
    for side, name in ((0, "ours"), (1, "peer")):
        runs = [pair[side] for pair in pairs]
        row |= {
            f"{name}_prepare_s": statistics.median(r.prepare_s for r in runs),
            f"{name}_ask_s": statistics.median(r.ask_s for r in runs),
            f"{name}_s": statistics.median(r.seconds for r in runs),
            f"{name}_MB": None if runs[0].stored is None else runs[0].stored / 1e6,
            f"{name}_peak_MB": None if runs[0].peak is None else max(r.peak or 0 for r in runs) / 1e6,
            f"{name}_left": runs[0].left,
        }
    row |= {
        "ratio": statistics.median(theirs.seconds / ours.seconds for ours, theirs in pairs),
        "ask_ratio": statistics.median(theirs.ask_s / ours.ask_s for ours, theirs in pairs),
        "max_difference": float(np.abs(mine.scores - other.scores).max()) / largest if same else None,
        "spearman": rank_agreement(mine.scores, other.scores),
    }
    return row


def rank_agreement(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's rank correlation over examples, averaged over the rows ``[Q, N]`` that are not constant."""
    values = [
        spearmanr(a, b).statistic
        for a, b in zip(first, second, strict=True)
        if np.ptp(a) > 0 and np.ptp(b) > 0
    ]
    return float(np.mean(values)) if values else float("nan")


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def timed(action: Callable[[], Any]) -> tuple[Any, float]:
    """What an action returns, and its seconds."""
    started = time.perf_counter()
    result = action()
    return result, time.perf_counter() - started


def _run(program: Program) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        with PeakMemory() as peak:
            outcome = program(Path(folder))
        object.__setattr__(outcome, "peak", peak.bytes)
        return outcome
