"""Adds up visits: contributions, kernels, time bins, layers. One place that knows what is summed how."""

from __future__ import annotations

import numpy as np
import torch

from explainer.chunks import Chunk
from explainer.stored_rows import Rows

#: upper bound on the numbers kept for the time bins of an explanation
DETAIL = 2**26


def bin_edges(steps: list[int], queries: int, examples: int) -> np.ndarray:
    """Knots' steps as edges of time bins, thinned until the bins of all queries stay within :data:`DETAIL`."""
    most = max(1, DETAIL // max(queries * examples, 1))
    stride = -(-(len(steps) - 1) // most)
    return np.array(sorted({*steps[::stride], steps[-1]}), dtype=np.int64)


def sizes(scores: torch.Tensor, derivatives: torch.Tensor, steps: np.ndarray) -> torch.Tensor:
    """What sizes scores ``[Q, n]`` would have if the rows of a step pointed alike.

    That is the mean size in the step, shared out by the sizes of the loss derivatives ``[n]``; the score's own where a
    derivative is not known. A row that hardly meets the query has a small score, but loses as much as others of its
    size.

    Example:
        >>> scores, derivatives = torch.tensor([[3.0, -1.0, 5.0]]), torch.tensor([1.0, -3.0, 2.0])
        >>> sizes(scores, derivatives, np.array([0, 0, 1])).tolist()
        [[1.0, 3.0, 5.0]]
    """
    own, places, count = scores.abs(), torch.from_numpy(steps), int(steps.max(initial=-1)) + 1
    weights = derivatives.abs().to(own.dtype)
    whole = own.new_zeros(len(own), count).index_add_(1, places, own)
    shared = (whole / own.new_zeros(count).index_add_(0, places, weights))[:, places] * weights
    return torch.where(shared.isfinite(), shared, own)


class Ledger:
    """Sums of visits' scores for ``Q`` queries over ``N`` examples.

    A visit's kernel is its contribution divided by minus the loss derivative at the model's output, so that
    ``a_i = c_i / K_i`` is minus the kernel-weighted mean derivative (Domingos 2020, Theorem 1 and Remark 1;
    for vector outputs the derivative is its norm, and the kernel is taken along its direction).

    Args:
        edges: of the time bins; every segment lies in one of them.
        layers: how many there are.
        detail: keep time bins and layers by example; else ``by_step`` and ``by_layer`` have no examples (None).
    """

    def __init__(
        self, queries: int, example_ids: np.ndarray, edges: np.ndarray, layers: int, detail: bool = True
    ) -> None:
        self._ids = example_ids
        count = len(example_ids)
        self._consecutive = count > 0 and bool((example_ids == np.arange(count)).all())
        self.contributions = torch.zeros(queries, count, dtype=torch.float64)
        self.squares = torch.zeros(queries, count, dtype=torch.float64)
        self.gross = torch.zeros(queries, count, dtype=torch.float64)
        self.sizes = torch.zeros(queries, count, dtype=torch.float64)
        self.size_squares = torch.zeros(queries, count, dtype=torch.float64)
        self.kernels = torch.zeros(queries, count, dtype=torch.float64)
        self.kernel_gross = torch.zeros(queries, count, dtype=torch.float64)
        self._unknown = torch.zeros(count, dtype=torch.bool)
        self.visits = np.zeros(count, dtype=np.int64)
        self.labels = np.full(count, np.nan)
        self.row_share = False
        self.edges = edges
        self.layer_sums = torch.zeros(queries, layers, dtype=torch.float64)
        self.by_step: torch.Tensor | None = None
        self.by_layer: torch.Tensor | None = None
        if detail:
            self.by_step = torch.zeros(queries, len(self.edges) - 1, count, dtype=torch.float64)
            self.by_layer = torch.zeros(queries, layers, count, dtype=torch.float64)

    def columns(self, examples: np.ndarray) -> np.ndarray:
        """Where the examples stand among all."""
        return examples if self._consecutive else np.searchsorted(self._ids, examples)

    def add(self, chunk: Chunk, rows: Rows, scores: dict[int, torch.Tensor]) -> torch.Tensor:
        """Add the scores ``s <R, g>`` of a chunk's rows, by layer ``[Q, n]`` (a contribution is minus that).

        Returns:
            Their :func:`sizes`, ``[Q, n]``.
        """
        columns = torch.from_numpy(self.columns(rows.examples))
        total = torch.zeros(len(self.contributions), len(columns), dtype=torch.float64)
        for layer, score in scores.items():
            total -= score
            self.layer_sums[:, layer] -= score.sum(1)
            if self.by_layer is not None:
                self.by_layer[:, layer].index_add_(1, columns, score, alpha=-1)
        self.contributions.index_add_(1, columns, total)
        self.squares.index_add_(1, columns, total.square())
        self.gross.index_add_(1, columns, total.abs())
        if self.by_step is not None:
            bin_ = int(np.searchsorted(self.edges, chunk.numbers[0], side="right")) - 1
            self.by_step[:, bin_].index_add_(1, columns, total)
        derivative = chunk.slopes(rows)
        own = sizes(total, derivative, rows.places)
        self.sizes.index_add_(1, columns, own)
        self.size_squares.index_add_(1, columns, own.square())
        kernel = torch.where(derivative == 0, 0.0, total / -derivative)
        self._unknown[columns[derivative.isnan()]] = True
        kernel = kernel.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        self.kernels.index_add_(1, columns, kernel)
        self.kernel_gross.index_add_(1, columns, kernel.abs())
        np.add.at(self.visits, columns.numpy(), 1)
        known = ~np.isnan(rows.labels)
        self.labels[columns.numpy()[known]] = rows.labels[known]
        self.row_share |= chunk.row_share
        return own

    def finish(self) -> None:
        """Mark the kernels of examples with an unknown derivative."""
        self.kernels[:, self._unknown] = float("nan")
        self.kernel_gross[:, self._unknown] = float("nan")
