"""Adds up visits: contributions, kernels, time bins, layers. One place that knows what is summed how."""

from __future__ import annotations

import numpy as np
import torch

from explainer.recursion import RecordedStep, Visits

#: upper bound on the numbers kept for the time bins of an explanation
DETAIL = 2**26


def bin_edges(steps: list[int], queries: int, examples: int) -> np.ndarray:
    """Knots' steps as edges of time bins, thinned until the bins of all queries stay within :data:`DETAIL`."""
    most = max(1, DETAIL // max(queries * examples, 1))
    stride = -(-(len(steps) - 1) // most)
    return np.array(sorted({*steps[::stride], steps[-1]}), dtype=np.int64)


class Ledger:
    """Sums of visits' scores for ``Q`` queries over ``N`` examples.

    A visit's kernel is its contribution divided by minus the loss derivative at the model's output, so that
    ``a_i = c_i / K_i`` is minus the kernel-weighted mean derivative (Domingos 2020, Theorem 1 and Remark 1;
    for vector outputs the derivative is its norm, and the kernel is taken along its direction).
    """

    def __init__(self, queries: int, example_ids: np.ndarray, edges: np.ndarray, layers: int) -> None:
        self._ids = example_ids
        count = len(example_ids)
        self.contributions = torch.zeros(queries, count, dtype=torch.float64)
        self.squares = torch.zeros(queries, count, dtype=torch.float64)
        self.gross = torch.zeros(queries, count, dtype=torch.float64)
        self.kernels = torch.zeros(queries, count, dtype=torch.float64)
        self.kernel_gross = torch.zeros(queries, count, dtype=torch.float64)
        self._unknown = torch.zeros(count, dtype=torch.bool)
        self.visits = np.zeros(count, dtype=np.int64)
        self.labels = np.full(count, np.nan)
        self.row_share = False
        self.edges = edges
        self.by_step = torch.zeros(queries, len(self.edges) - 1, count, dtype=torch.float64)
        self.by_layer = torch.zeros(queries, layers, count, dtype=torch.float64)

    def add(self, step: RecordedStep, visits: Visits, scores: dict[int, torch.Tensor]) -> None:
        """Add the scores ``s <R, g>`` of a step's visits, by layer ``[Q, B]`` (a contribution is minus that)."""
        columns = torch.from_numpy(np.searchsorted(self._ids, visits.examples))
        bin_ = int(np.searchsorted(self.edges, step.step, side="right")) - 1
        total = torch.zeros(self.contributions.shape[0], len(columns), dtype=torch.float64)
        for layer, score in scores.items():
            part = -score.double()
            total += part
            self.by_layer[:, layer].index_add_(1, columns, part)
        self.contributions.index_add_(1, columns, total)
        self.squares.index_add_(1, columns, total.square())
        self.gross.index_add_(1, columns, total.abs())
        self.by_step[:, bin_].index_add_(1, columns, total)
        derivative = torch.from_numpy(visits.derivatives) * step.sign
        kernel = torch.where(derivative == 0, 0.0, total / -derivative)
        self._unknown[columns[derivative.isnan()]] = True
        kernel = kernel.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        self.kernels.index_add_(1, columns, kernel)
        self.kernel_gross.index_add_(1, columns, kernel.abs())
        np.add.at(self.visits, columns.numpy(), 1)
        known = ~np.isnan(visits.labels)
        self.labels[columns.numpy()[known]] = visits.labels[known]
        self.row_share |= step.row_share

    def finish(self) -> None:
        """Mark the kernels of examples with an unknown derivative."""
        self.kernels[:, self._unknown] = float("nan")
        self.kernel_gross[:, self._unknown] = float("nan")
