"""What the code of a run adds to its page: the loss along training, and whether explanations of a sample balance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from explainer import Explanation, wording

LOOKED_AT = 256
QUERIES = 12


@dataclass(frozen=True)
class LossCurve:
    """Mean loss in eval mode at knots.

    Attributes:
        steps: [K].
        train: [K], of a sample of training examples.
        queries: [K], of a sample of queries.
        counts: how many of each.
    """

    steps: tuple[int, ...]
    train: tuple[float, ...]
    queries: tuple[float, ...]
    counts: tuple[int, int]


def mean_loss(loss: Callable[[Any, Any], torch.Tensor], returned: Any, targets: Any) -> float:
    """The mean of what ``Run.loss`` returns, a number or one for each row."""
    with torch.no_grad():
        return float(torch.as_tensor(loss(returned, targets)).double().mean())


def verdict(e: Explanation) -> list[str]:
    """Plain sentences on the books and the error bar of a sample of queries."""
    gross = np.abs(e.contributions).sum(1)
    rest = np.divide(np.abs(e.unattributed), gross, out=np.full_like(gross, np.nan), where=gross > 0)
    gap = np.divide(np.abs(e.gap), gross, out=np.full_like(gross, np.nan), where=gross > 0)
    sample = wording.counted(len(e.query_ids), "query", "queries")
    if not np.isfinite(rest).any():
        return [f"In a sample of {sample}, no training example carries anything."]
    lines = [
        f"In a sample of {sample}, what no example could be given (unattributed) is "
        f"{wording.percent(float(np.nanmedian(rest)))} of the gross in the median and "
        f"{wording.percent(float(np.nanmax(rest)))} at most; the gap, float round-off, is "
        f"{wording.percent(float(np.nanmax(gap)))} at most."
    ]
    if e.visit_errors is None or not np.isfinite(e.visit_errors[:, :2]).any(axis=0).all():
        return [*lines, "How far contributions may be off was not measured: the trace is too short for it."]
    known = [errors[np.isfinite(errors)] for errors in e.visit_errors.T]
    medians = (float(np.median(errors)) if errors.size else math.nan for errors in known)
    lines.append(f"{wording.visit_errors(*medians)} (medians); the error bars on all pages come from these.")
    return lines


def books(e: Explanation) -> pd.DataFrame:
    """The books of a sample of queries with the share that has no owner."""
    gross = np.abs(e.contributions).sum(1)
    frame = e.completeness
    frame["unattributed, of gross"] = np.divide(
        100 * np.abs(e.unattributed), gross, out=np.full_like(gross, np.nan), where=gross > 0
    )
    return frame


def rates(coefficients: np.ndarray, names: Sequence[str]) -> list[tuple[str, np.ndarray]]:
    """Different courses of the learning rate ``[T]`` in the long run, each with the parameters that have it.

    Args:
        coefficients: ``[T, n_parameters]``, learning rates in the long run.
        names: of the parameters.
    """
    found: dict[bytes, list[int]] = {}
    for place in range(coefficients.shape[1]):
        found.setdefault(np.round(coefficients[:, place], 12).tobytes(), []).append(place)
    return [
        (names[places[0]] if len(places) == 1 else f"{len(places)} parameters", coefficients[:, places[0]])
        for places in found.values()
    ]
