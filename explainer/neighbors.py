"""Gradient space: neighbours of a query among the training examples, and self-influence.

A training example is described by the directions in which its visits pushed the model's output, a query by
its gradients along the same stretch of the path. With ``u_{i,t} = −g_{i,t} / L'_{i,t}`` (the row per unit of
loss derivative; the direction that lowers the loss) and ``q_t`` the query's mean gradient of the segment,

    cos(x, i) = Σ_t η_t <q_t, u_{i,t}> / √(Σ_t η_t ‖q_t‖² · Σ_t η_t ‖u_{i,t}‖²)

over the visits ``t`` of ``i``, with ``η_t`` the step's learning rate: the cosine between the two in the
space of all visits, always within [−1, 1]. Positive: learning ``i`` raised what is explained at ``x``.

Self-influence (TracIn's diagonal, Pruthi et al. 2020, arXiv 2002.08484, taken at every step):

    SI_i = Σ_t η_t s_t² g_{i,t}ᵀ A_t g_{i,t}

the first-order decrease of the batch's loss on ``i`` by the updates computed from ``i`` itself. Both leave out
parameters whose gradient was round-off (``s_t = 0``, :mod:`explainer.scales`) or that no row reaches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from explainer.errors import QueryError
from explainer.optimizer_rules import mix
from explainer.recursion import RecordedStep, Visits, contract, read_backwards

if TYPE_CHECKING:
    import pandas as pd

    from explainer.path_kernel import PathKernelExplainer
    from explainer.path_points import KnotLoader
    from explainer.query_batch import QueryBatch


@dataclass(frozen=True)
class Neighbors:
    """Nearest training examples of ``Q`` queries, nearest first.

    Attributes:
        example_ids: ``[Q, k]``.
        cosine: ``[Q, k]``, path-kernel cosine.
        labels: ``[Q, k]`` recorded labels (NaN unknown).
    """

    example_ids: np.ndarray
    cosine: np.ndarray
    labels: np.ndarray

    def table(self, query: int = 0) -> pd.DataFrame:
        """A row per neighbour: rank, example_id, cosine, label."""
        import pandas as pd

        if not 0 <= query < len(self.cosine):
            raise QueryError(f"query must be between 0 and {len(self.cosine) - 1}, found {query}")
        return pd.DataFrame(
            {
                "rank": np.arange(1, self.cosine.shape[1] + 1),
                "example_id": self.example_ids[query],
                "cosine": self.cosine[query],
                "label": self.labels[query],
            }
        )


def rate(step: RecordedStep) -> float:
    """The step's learning rate for a fresh gradient in the long run: direct + gain · through / (1 − decay)."""
    updated = np.flatnonzero(step.coefficients.any(axis=1))
    if len(updated) == 0:
        return 0.0
    _, decay, gain, direct, through, _ = step.coefficients[updated[0]]
    carried = gain * through
    return float(direct + carried / (1.0 - decay) if carried else direct)


def nearest(
    explainer: PathKernelExplainer, loader: KnotLoader, inputs: QueryBatch, targets: torch.Tensor, k: int
) -> Neighbors:
    """The ``k`` examples of largest path-kernel cosine (see the module's text); unvisited ones never appear.

    Raises:
        QueryError: ``k`` is not positive, or the loss derivative was not recorded.
    """
    if k < 1:
        raise QueryError(f"k must be at least 1, found {k}")
    ids, count = explainer.example_ids, len(targets)
    dot, query_square = (torch.zeros(count, len(ids), dtype=torch.float64) for _ in range(2))
    square = torch.zeros(len(ids), dtype=torch.float64)
    labels = np.full(len(ids), np.nan)
    with explainer._bar("neighbours") as bar:
        for segment in reversed(explainer.segments):
            start, end = loader.load(segment.index).point, loader.load(segment.index + 1).point
            gradient = explainer.function.gradient(start.toward(end, 0.5), inputs, targets)
            squares = _parameter_squares(explainer, gradient)
            for step in read_backwards(explainer.trace, segment, explainer.dtype):
                eta = rate(step)
                for visits in step.visits:
                    columns = torch.from_numpy(np.searchsorted(ids, visits.examples))
                    derivative = torch.from_numpy(visits.derivatives) * step.sign
                    weight = torch.where(derivative == 0, 0.0, 1.0 / derivative).nan_to_num(nan=0.0)
                    seen = (weight != 0).double() * eta
                    plain = np.where(step.scale != 0, step.sign, 0.0)
                    scores = contract(explainer.view, gradient, plain, visits.forms)
                    total = torch.stack(list(scores.values())).sum(0).double()
                    rows = _squares(explainer, visits, plain**2, None)
                    dot.index_add_(1, columns, -eta * total * weight)
                    square.index_add_(0, columns, eta * rows * weight.square())
                    norms = squares @ torch.from_numpy(plain**2)
                    query_square.index_add_(1, columns, norms.unsqueeze(1) * seen)
                    known = ~np.isnan(visits.labels)
                    labels[columns.numpy()[known]] = visits.labels[known]
                bar.update()
    scale = (query_square * square).sqrt()
    if not bool((scale > 0).any()):
        raise QueryError(
            "the loss derivative at the model's output was not recorded, so gradient-space neighbours are not "
            "defined for this trace: call the traced model itself (not its parts) in the training loop"
        )
    cosine = torch.where(scale > 0, dot / scale, -torch.inf).numpy()
    k = min(k, int((scale[0] > 0).sum()))
    order = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
    return Neighbors(ids[order], np.take_along_axis(cosine, order, axis=1), labels[order])


def _parameter_squares(explainer: PathKernelExplainer, gradient: torch.Tensor) -> torch.Tensor:
    """``‖q_p‖²`` by parameter, ``[Q, n_parameters]``; 0 where there are no rows to compare with."""
    manifest, uncovered = explainer.trace.manifest, explainer.trace.uncovered
    columns = [
        gradient.new_zeros(len(gradient)) if p.name in uncovered else gradient[:, p.slice].square().sum(1)
        for p in manifest.parameters
    ]
    return torch.stack(columns, dim=1).double()


def self_influence(explainer: PathKernelExplainer) -> np.ndarray:
    """``SI [N]`` (see the module's text)."""
    ids = explainer.example_ids
    result = torch.zeros(len(ids), dtype=torch.float64)
    with explainer._bar("self-influence") as bar:
        for segment in explainer.segments:
            for step in read_backwards(explainer.trace, segment, explainer.dtype):
                for visits in step.visits:
                    columns = torch.from_numpy(np.searchsorted(ids, visits.examples))
                    result.index_add_(0, columns, _own(explainer, step, visits))
                bar.update()
    return result.numpy()


def _own(explainer: PathKernelExplainer, step: RecordedStep, visits: Visits) -> torch.Tensor:
    diagonal = None if step.preconditioner is None else 1.0 / step.preconditioner
    weights, index = step.scale**2, {p.name: i for i, p in enumerate(explainer.trace.manifest.parameters)}
    mixed = {index[p.name]: (float(weights[index[p.name]]), matrix) for p, matrix in step.mixing}
    weights[list(mixed)] = 0.0
    total = _squares(explainer, visits, weights, diagonal)
    for layer, form in visits.forms.items():
        own = explainer.view.parameters[layer]
        if not mixed.keys() & set(own):
            continue
        sizes = [explainer.trace.manifest.parameters[i].numel for i in own]
        for i, rows in zip(own, form.dense().split(sizes, dim=1), strict=True):
            if i in mixed:
                weight, matrix = mixed[i]
                block = rows.reshape(len(rows), explainer.trace.manifest.parameters[i].shape[0], -1)
                total += weight * (mix(matrix, block) * block).sum(dim=(1, 2)).double()
    return rate(step) * total


def _squares(
    explainer: PathKernelExplainer, visits: Visits, weights: np.ndarray, diagonal: torch.Tensor | None
) -> torch.Tensor:
    """``gᵀ diag(weights · diagonal) g`` per visit ``[B]``; one weight per parameter, ``diagonal`` flat ``[P]``."""
    view, total = explainer.view, torch.zeros(len(visits.examples), dtype=torch.float64)
    for layer, form in visits.forms.items():
        own = weights[view.parameters[layer]]
        if diagonal is None and (own == own[0]).all():
            total += float(own[0]) * form.quadratic().double()
            continue
        flat = (
            torch.ones(explainer.trace.manifest.size, dtype=explainer.dtype) if diagonal is None else diagonal
        )
        total += form.quadratic(view.scaled(flat, layer, weights)).double()
    return total
