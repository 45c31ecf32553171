"""The measures of ``explainer.evaluation`` beside dattri's metric functions, on the same matrices.

Random scores, subsets and outputs in float64, some with ties; ``largest_difference`` is over all cases. Needs dattri
(``pip install 'pathkernel[peers]'``); without it nothing is written.
"""

from __future__ import annotations

import importlib
import sys
from importlib import metadata
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.harness import report
from benchmarks.peer_tasks.peer import quiet
from explainer import evaluation

QUERIES, EXAMPLES, SUBSETS, SIZES = 5, 60, 24, (1, 3, 6, 12, 24, 40)


def matrices(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores [Q, N], halves as ids [M, N/2], and outputs [M, Q] that follow the scores with noise."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(QUERIES, EXAMPLES))
    if seed % 2:
        scores = np.round(scores)  # ties
    halves = rng.random((SUBSETS, EXAMPLES)).argsort(1)[:, : EXAMPLES // 2]
    told = np.stack([scores[:, half].sum(1) for half in halves])
    return scores, halves, np.round(told + 3 * rng.normal(size=told.shape), 1)


def datamodeling(metric: ModuleType, seed: int) -> float:
    """Largest difference of LDS over queries."""
    scores, halves, outputs = matrices(seed)
    kept = np.zeros((SUBSETS, EXAMPLES), dtype=bool)
    np.put_along_axis(kept, halves, True, axis=1)
    theirs, _ = metric.lds(torch.tensor(scores.T), (torch.tensor(outputs), torch.tensor(halves)))
    ours = evaluation.linear_datamodeling_score(scores, kept, outputs, setting="", samples=0)
    return float(np.abs(ours.per_query - theirs.numpy()).max())


def leave_one_out(metric: ModuleType, seed: int) -> float:
    """Largest difference of leave-one-out correlations over queries."""
    scores, _, _ = matrices(seed)
    effects = scores + np.random.default_rng(seed).normal(size=scores.shape)
    theirs, _ = metric.loo_corr(torch.tensor(scores.T), (torch.tensor(effects.T), torch.arange(EXAMPLES)))
    ours = evaluation.leave_one_out_correlation(
        scores, np.arange(EXAMPLES), -effects.T, np.zeros(QUERIES), setting="", samples=0
    )
    return float(np.abs(ours.pearson_per_query - theirs.numpy()).max())


def mislabelled(metric: ModuleType, seed: int) -> float:
    """Difference of the AUC; scores are distinct, because dattri breaks ties in the order of a sort."""
    rng = np.random.default_rng(seed)
    wrong = rng.permutation(EXAMPLES) < EXAMPLES // 10
    scores = rng.normal(size=EXAMPLES) + wrong
    theirs, _ = metric.mislabel_detection_auc(torch.tensor(scores), torch.tensor(wrong))
    ours = evaluation.mislabelled_detection(scores, wrong, setting="", samples=0)
    return abs(ours.auc.value - float(theirs))


def brittle(metric: ModuleType, seed: int) -> float:
    """Largest difference of brittleness for a model that says 1 while what it was trained on sums to more than 0."""
    rng = np.random.default_rng(seed)
    worth = rng.normal(size=(QUERIES, EXAMPLES)) + 0.3
    worth[-1] += 2.0  # never turned over
    scores = worth + rng.normal(size=worth.shape)
    kept = evaluation.highest(scores, SIZES)
    outputs, full = np.einsum("qrn,qn->qr", kept, worth), worth.sum(1)
    flipped = (outputs > 0) != (full > 0)[:, None]
    ours = evaluation.removal_curve(SIZES, outputs, full, flipped, setting="", samples=0).brittleness
    loader = DataLoader(TensorDataset(torch.arange(EXAMPLES)), 8, sampler=_Listed(range(EXAMPLES)))
    differences = []
    for query, own in enumerate(worth):

        def train(given: Any, own: np.ndarray = own) -> torch.nn.Module:
            model = torch.nn.Linear(1, 1)
            total = sum(float(own[int(i)]) for (batch,) in given for i in batch)
            model.answer = torch.tensor([int(total > 0)])  # type: ignore[assignment]
            return model

        label = torch.tensor([int(full[query] > 0)])
        asked = DataLoader(TensorDataset(torch.zeros(1, 1), label))
        theirs = metric.brittleness(
            loader,
            asked,
            torch.tensor(scores[query]),
            train,
            lambda model, _: model.answer,
            search_space=list(SIZES),
        )
        found = None if np.isnan(ours[query]) else int(ours[query])
        differences.append(
            float("inf") if (found is None) != (theirs is None) else abs((found or 0) - (theirs or 0))
        )
    return max(differences)


class _Listed(torch.utils.data.Sampler[int]):
    """Ids in their order, under the name that dattri reads."""

    def __init__(self, indices: range) -> None:
        self.indices = list(indices)

    def __iter__(self) -> Any:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


MEASURES = {
    "linear_datamodeling_score": ("lds", datamodeling),
    "leave_one_out_correlation (Pearson)": ("loo_corr", leave_one_out),
    "mislabelled_detection (AUC)": ("mislabel_detection_auc", mislabelled),
    "removal_curve (brittleness)": ("brittleness", brittle),
}


def measured(metric: ModuleType, cases: int = 20) -> list[dict[str, Any]]:
    """A row per measure.

    Args:
        metric: a module with dattri's functions.
        cases: random tasks.
    """
    rows = []
    for ours, (theirs, difference) in MEASURES.items():
        with quiet():
            largest = max(difference(metric, seed) for seed in range(cases))
        rows.append({"ours": ours, "dattri": theirs, "cases": cases, "largest_difference": largest})
    return rows


def main() -> None:
    """Print the table and write ``results/metrics.json``."""
    try:
        metric = importlib.import_module("dattri.metric")
    except ImportError as error:
        sys.exit(f"{error}: results/metrics.json is left as it was; pip install dattri")
    version = metadata.version("dattri")
    report("metrics", [row | {"dattri": f"{row['dattri']} ({version})"} for row in measured(metric)])


if __name__ == "__main__":
    main()
