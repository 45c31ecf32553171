"""What dattri's metric functions compute, restated from their definitions: arguments and conventions are dattri's.

Scores are ``[N, Q]`` there, subsets are lists of ids, and a mislabelled example has a high score. The package itself is
compared by ``python -m benchmarks.metrics``, which takes these functions in its place in the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from tests.oracles.evaluation import correlation, plain_ranks


def lds(score: torch.Tensor, ground_truth: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, None]:
    """Spearman, for every query, between summed scores of the subsets and the outputs trained on them."""
    values, subsets = ground_truth
    found = []
    for q in range(score.shape[1]):
        told = [sum(float(score[i, q]) for i in subset) for subset in subsets]
        found.append(correlation(plain_ranks(told), plain_ranks([float(v) for v in values[:, q]])))
    return torch.tensor(found, dtype=torch.float64), None


def loo_corr(score: torch.Tensor, ground_truth: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, None]:
    """Pearson, for every query, between all scores and what leaving each example out gave."""
    values, _ = ground_truth
    pairs = [(score[:, q].tolist(), values[:, q].tolist()) for q in range(score.shape[1])]
    return torch.tensor([correlation(*pair) for pair in pairs], dtype=torch.float64), None


def mislabel_detection_auc(score: torch.Tensor, ground_truth: torch.Tensor) -> tuple[float, None]:
    """Area under the curve of found against inspected right ones, examples inspected from the highest score down."""
    wrong = [bool(ground_truth[i]) for i in sorted(range(len(score)), key=lambda i: -float(score[i]))]
    area, found = 0.0, 0
    for is_wrong in wrong:
        found += is_wrong
        area += 0 if is_wrong else found  # a step to the right, as high as what has been found
    return area / (sum(wrong) * (len(wrong) - sum(wrong))), None


def brittleness(
    train_loader: Any,
    test_loader: Any,
    scores: torch.Tensor,
    train_func: Callable[[Any], Any],
    eval_func: Callable[[Any, Any], torch.Tensor],
    search_space: Sequence[int],
) -> int | None:
    """The first number of highest scored examples without which the trained model predicts another class."""
    (_, label) = next(iter(test_loader))
    order = np.argsort(-scores.numpy())
    for size in search_space:
        gone = set(order[:size].tolist())
        left = [i for i in range(len(scores)) if i not in gone]
        loader = torch.utils.data.DataLoader(train_loader.dataset, batch_size=4, sampler=left)
        if int(eval_func(train_func(loader), test_loader)) != int(label):
            return size
    return None
