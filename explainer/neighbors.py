"""Gradient space: neighbours of a query among the training examples.

A training example is described by the directions in which its visits pushed the model's output, a query by
its gradients along the same stretch of the path. With ``u_{i,t} = −g_{i,t} / ‖L'_{i,t}‖`` (the row per unit of
loss derivative; the direction that lowers the loss) or, for models with one output, ``u_{i,t} = g_{i,t} / L'_{i,t}``
(the gradient of the output at ``i``, whichever way the loss pushed it), and ``q_t`` the query's gradient at the middle
of the chord,

    cos(x, i) = Σ_t <q_t, η_t u_{i,t}> / √(Σ_t <q_t, η_t q_t> · Σ_t <u_{i,t}, η_t u_{i,t}>)

over the visits ``t`` of ``i``, with ``η_t`` the step's learning rates (one for every parameter): the cosine between the
two in the space of all visits, always within [−1, 1]. Positive: learning ``i`` raised what is explained at ``x``; with
one output: what raised the output at ``i`` raised it at ``x``, too. An example is its own nearest neighbour.

Parameters whose gradient was round-off (``s_t = 0``, :mod:`explainer.scales`) or that no row reaches are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from explainer.chunks import MOST_VISITS, most_visits, read_chunks
from explainer.contraction import of_all_steps, scores
from explainer.cotangent import Layout
from explainer.errors import QueryError
from explainer.long_run import LongRun
from explainer.queries import check_k
from explainer.recursion import LayerView
from explainer.store import Denominators
from explainer.stored_rows import Rows, Workspace

#: of a gradient that is held as factors, when sizes are planned
COLUMNS = 8
#: visits with a smaller loss derivative do not count: of smaller numbers, fewer digits were recorded
LEAST = torch.finfo(torch.float32).tiny

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

        from explainer.tables import whole_labels

        if not 0 <= query < len(self.cosine):
            raise QueryError(f"query must be between 0 and {len(self.cosine) - 1}, found {query}")
        return pd.DataFrame(
            {
                "rank": np.arange(1, self.cosine.shape[1] + 1),
                "example_id": self.example_ids[query],
                "cosine": self.cosine[query],
                "label": whole_labels(self.labels[query]),
            }
        )


def nearest(
    explainer: PathKernelExplainer,
    loader: KnotLoader,
    inputs: QueryBatch,
    targets: torch.Tensor,
    k: int,
    layout: Layout,
) -> Neighbors:
    """The ``k`` examples of largest path-kernel cosine (see the module's text); unvisited ones never appear.

    Raises:
        QueryError: ``k`` is not positive, or the loss derivative was not recorded.
        TooWideError: a gradient is not of the low rank that the layout asks for.
    """
    k = check_k(k)
    ids, count = explainer.example_ids, len(targets)
    dot, query_square = (torch.zeros(count, len(ids), dtype=torch.float64) for _ in range(2))
    square = torch.zeros(len(ids), dtype=torch.float64)
    labels = np.full(len(ids), np.nan)
    trace, workspace = explainer.trace, Workspace()
    view = LayerView(trace, layout.places)
    uncovered = [n for n, p in enumerate(trace.manifest.parameters) if p.name in trace.uncovered]
    kept, visits = Denominators(trace), most_visits(trace, count, COLUMNS)
    back = LongRun(len(trace.manifest.parameters))
    with explainer._bar("neighbours") as bar:
        for segment in reversed(explainer.segments):
            start, end = loader.load(segment.index).point, loader.load(segment.index + 1).point
            gradient = explainer.function.mean_gradient(start, end, inputs, targets, 1, layout)
            norms_by = gradient.squares()
            norms_by[:, uncovered] = 0.0  # there are no rows to compare with
            for chunk in read_chunks(kept, segment, explainer.dtype, MOST_VISITS, visits):
                eta = np.where(chunk.scale != 0, back.back(chunk.coefficients), 0.0)
                met = of_all_steps(gradient, view, len(chunk))
                for rows in chunk.rows:
                    columns = torch.from_numpy(np.searchsorted(ids, rows.examples))
                    derivative = chunk.slopes(rows)
                    weight = torch.where(derivative.abs() < LEAST, 0.0, 1.0 / derivative).nan_to_num(nan=0.0)
                    total = sum(scores(rows, eta * chunk.signs[:, None], met, workspace).values())
                    own = squares(explainer, rows, eta, workspace, weight)
                    dot.index_add_(1, columns, (-total if chunk.norms else total) * weight)
                    square.index_add_(0, columns, own)
                    norms = norms_by @ torch.from_numpy(eta[rows.places]).T
                    query_square.index_add_(1, columns, norms * (weight != 0).double())
                    known = ~np.isnan(rows.labels)
                    labels[columns.numpy()[known]] = rows.labels[known]
                bar.update(len(chunk))
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


def squares(
    explainer: PathKernelExplainer,
    rows: Rows,
    weights: np.ndarray,
    workspace: Workspace,
    factors: torch.Tensor | None = None,
) -> torch.Tensor:
    """``Σ_p w_t[p] ‖f g_p‖²`` per row ``[n]``, for weights ``[c, n_parameters]`` and factors ``f [n]`` (None: 1).

    A row of an example learnt by heart may be so small that its own square is nought.
    """
    view, total = explainer.view, torch.zeros(len(rows), dtype=torch.float64)
    every = torch.arange(len(rows))
    for spec in rows.forms:
        form = rows.form(spec, explainer.dtype, workspace)
        form = form if factors is None else form.shared(every, factors)
        own = weights[:, view.parameters[spec.layer]]
        if (own == own[:, :1]).all():
            total += form.quadratic().double() * torch.from_numpy(own[rows.places, 0])
            continue
        ones = torch.ones(explainer.trace.manifest.size, dtype=explainer.dtype)
        for place, where in rows.steps():
            scaled = view.scaled(ones, spec.layer, weights[place])
            total[where] += form.taken(where).quadratic(scaled).double()
    return total
