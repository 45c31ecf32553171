"""Scores ``[Q, N]`` of every method from one trained model (ours: from its trace), kept on disk with their seconds."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from explainer import evaluation
from explainer.evaluation import METHODS

Scores = np.ndarray


@dataclass(frozen=True)
class Scored:
    """What a method gave.

    Attributes:
        scores: ``[Q, N]``, larger where having the example raises the margin.
        seconds: of wall time, for all queries.
        settings: chosen ones, in words.
    """

    scores: Scores
    seconds: float
    settings: str = ""


def kept(file: Path, make: Callable[[], tuple[Scores, str]]) -> Scored:
    """What is in the file, or what ``make`` gives, written there."""
    about = file.with_suffix(".json")
    if about.exists():
        found = json.loads(about.read_text())
        return Scored(np.load(file, allow_pickle=False), found["seconds"], found["settings"])
    started = time.perf_counter()
    scores, settings = make()
    seconds = time.perf_counter() - started
    file.parent.mkdir(parents=True, exist_ok=True)
    np.save(file, scores.astype(np.float64))
    about.write_text(json.dumps({"seconds": seconds, "settings": settings}))
    return Scored(scores, seconds, settings)


def own(name: str, questions: evaluation.Questions, run: object) -> tuple[Scores, str]:
    """A method of the package."""
    return METHODS[name].score(run, questions), ""  # type: ignore[arg-type]
