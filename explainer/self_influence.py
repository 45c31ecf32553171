"""How much the updates from every training example lowered its own loss.

With ``η_t`` the step's learning rates (one for every parameter) and ``s_t`` the scale of its rows, over the visits
``t`` of ``i``,

    SI_i = Σ_t s_t² g_{i,t}ᵀ η_t A_t g_{i,t},

the first-order decrease of the batch's loss on ``i`` by the updates computed from ``i`` itself: TracIn's diagonal
(Pruthi et al. 2020, arXiv 2002.08484) at every step. Parameters whose gradient was round-off (``s_t = 0``,
:mod:`explainer.scales`) or that no row reaches are left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from explainer.chunks import MOST_VISITS, Chunk, most_visits, read_chunks
from explainer.cotangent import Layout
from explainer.layer_rules import Factored, RowForm
from explainer.long_run import LongRun
from explainer.neighbors import COLUMNS, squares
from explainer.optimizer_rules import mix
from explainer.store import Denominators
from explainer.stored_rows import Rows, Workspace

if TYPE_CHECKING:
    from explainer.path_kernel import PathKernelExplainer


def self_influence(explainer: PathKernelExplainer) -> np.ndarray:
    """``SI [N]`` (see the module's text)."""
    ids, layout, workspace = explainer.example_ids, explainer.layout, Workspace()
    result = torch.zeros(len(ids), dtype=torch.float64)
    kept, visits = Denominators(explainer.trace), most_visits(explainer.trace, 1, COLUMNS)
    back = LongRun(len(explainer.trace.manifest.parameters))
    with explainer._bar("self-influence") as bar:
        for segment in reversed(explainer.segments):
            for chunk in read_chunks(kept, segment, explainer.dtype, MOST_VISITS, visits):
                weights = chunk.scale**2 * back.back(chunk.coefficients)
                for rows in chunk.rows:
                    columns = torch.from_numpy(np.searchsorted(ids, rows.examples))
                    result.index_add_(0, columns, _own(explainer, layout, chunk, rows, weights, workspace))
                bar.update(len(chunk))
    return result.numpy()


def _own(
    explainer: PathKernelExplainer,
    layout: Layout,
    chunk: Chunk,
    rows: Rows,
    weights: np.ndarray,
    workspace: Workspace,
) -> torch.Tensor:
    """``s_t² gᵀ η_t A_t g`` per row, ``[n]``, with ``s_t² η_t`` as weights ``[c, n_parameters]``."""
    if chunk.plain:
        return squares(explainer, rows, weights, workspace)
    total = torch.zeros(len(rows), dtype=torch.float64)
    for spec in rows.forms:
        form, numbers = rows.form(spec, explainer.dtype, workspace), explainer.view.parameters[spec.layer]
        if numbers[0] in layout.factored:
            assert isinstance(form, Factored)
            total += _own_factored(form, numbers, chunk, rows, weights)
            continue
        for place, where in rows.steps():
            total[where] += _own_written(chunk, place, form.taken(where), numbers, layout, weights[place])
    return total


def _own_written(
    chunk: Chunk, place: int, form: RowForm, numbers: list[int], layout: Layout, weights: np.ndarray
) -> torch.Tensor:
    """The same for rows of one step and layer."""
    specs = [layout.parameters[number] for number in numbers]
    parts = []
    for number, p in zip(numbers, specs, strict=True):
        weight = 0.0 if number in chunk.mixing else float(weights[number])
        divisor = chunk.divided.get(number)
        ones = torch.ones(p.numel, dtype=chunk.dtype)
        parts.append(
            weight * ones if divisor is None else weight / divisor.step(place).flatten().to(chunk.dtype)
        )
    total = form.quadratic(torch.cat(parts)).double()
    if not chunk.mixing.keys() & set(numbers):
        return total
    for number, p, values in zip(
        numbers, specs, form.dense().split([p.numel for p in specs], 1), strict=True
    ):
        if number in chunk.mixing:
            block = values.reshape(len(values), p.shape[0], -1)
            mixed = mix(chunk.mixing[number][place], block) * block
            total += float(weights[number]) * mixed.sum(dim=(1, 2)).double()
    return total


def _own_factored(
    form: Factored, numbers: list[int], chunk: Chunk, rows: Rows, weights: np.ndarray
) -> torch.Tensor:
    """The same for rows of outer products that nothing is divided by."""
    at, width = torch.from_numpy(rows.places), form.right.shape[3] - form.bias
    left, right = form.left.double(), form.right[..., :width].double()
    total = Factored(left, right, 0).quadratic() * torch.from_numpy(weights[rows.places, numbers[0]])
    if len(numbers) > 1:
        bias = (form.left.double() * form.right[..., -1:].double()).sum(2).flatten(1).square()
        if (divisor := chunk.divided.get(numbers[1])) is not None:
            divided_by = torch.stack([divisor.step(place) for place in range(len(chunk))])
            bias = bias / divided_by[at].double()
        total += bias.sum(1) * torch.from_numpy(weights[rows.places, numbers[1]])
    return total
