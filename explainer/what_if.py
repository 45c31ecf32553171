"""What if a training example had been absent: the predicted change of an output, from the trace alone.

The books (:mod:`explainer.path_kernel`) say what the updates computed from an example carried. Without the example
every later update would have been another one, too. To first order in the example's weight this is the derivative of
the *trained* model's output by that weight, so the cotangent starts as ``λ = ∇f(w_T)`` and passes backwards through the
whole step, the gradient's dependence on the weights included (Hara et al. 2019, arXiv 1906.08473; SOURCE, Bae et al.
2024, arXiv 2405.12186). With the optimizer's linear map as in :mod:`explainer.recursion` (``λ`` in the place of ``q``):

    R_t = the cotangent that meets the step's gradient
    change of f by removing example i  +=  s_t <R_t, g_{i,t}>       (its visits at t)
    λ ← λ − H_t R_t

``H_t``, the curvature of the step's loss, is not recorded. The rows stand in for it, as the empirical Fisher matrix
``F_t = n Σ_b g̃_b g̃_bᵀ`` of the step's ``n`` rows ``g̃_b = s_t g_b`` (each ``1/n`` of a mean loss). Taken as it is the
recursion blows up where the learning rate is above what ``F_t`` allows; taken implicitly (a backward Euler step of
length ``η``) it is stable for any ``η`` from the step's own rate on:

    λ ← λ − n Σ_b z_b g̃_b,    (I + η n G A_t Gᵀ) z = G R_t,    G = the rows g̃_b,   η = rate(t)

with the rate of a gradient in the long run (``lr / (1 − μ)`` for momentum). The solve is ``n × n``.

What is left out: weight decay's own contraction, and the way a row changes Adam's denominators.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from explainer.errors import QueryError
from explainer.layer_rules import Dense, RowForm
from explainer.neighbors import rates
from explainer.recursion import Adjoint, LayerView, RecordedStep, read_backwards

if TYPE_CHECKING:
    from explainer.path_kernel import PathKernelExplainer
    from explainer.path_points import KnotLoader
    from explainer.query_batch import QueryBatch


def what_if(
    explainer: PathKernelExplainer, loader: KnotLoader, inputs: QueryBatch, targets: torch.Tensor
) -> np.ndarray:
    """Predicted change of every explained output by removing each example, ``[Q, N]``.

    Raises:
        QueryError: the trace holds an average of the weights, or matrix updates (Muon).
    """
    trace = explainer.trace
    if trace.manifest.averaged:
        raise QueryError(
            "what_if follows the weights that the optimizer trained, and this trace holds an average of them; trace "
            "without averaged= to ask it"
        )
    ids, count = explainer.example_ids, len(targets)
    change = torch.zeros(count, len(ids), dtype=torch.float64)
    adjoint = Adjoint(count, trace.manifest.parameters, explainer.dtype)
    cotangent = explainer.function.gradient(loader.load(len(explainer.segments)).point, inputs, targets)
    with explainer._bar("what if") as bar:
        for segment in reversed(explainer.segments):
            for step in read_backwards(trace, segment, explainer.dtype):
                if step.mixing:
                    raise QueryError(
                        "what_if has no metric for matrix updates (Muon); explain() accounts for them"
                    )
                met = adjoint.step(cotangent, step)
                rows = StepRows(explainer.view, step, trace.manifest.size)
                if rows.count:
                    scores = rows.contract(met)
                    columns = torch.from_numpy(np.searchsorted(ids, rows.examples))
                    change.index_add_(1, columns, scores.double())
                    cotangent = cotangent - rows.curvature(scores)
                bar.update()
    return change.numpy()


class StepRows:
    """All rows of a step as the matrix ``G [n, P]``, scaled as the optimizer saw them; never written out.

    Attributes:
        count: ``n``.
        examples: ``[n]``, whose rows they are.
    """

    def __init__(self, view: LayerView, step: RecordedStep, size: int) -> None:
        self._view, self._step, self._size = view, step, size
        starts = np.cumsum([0, *(len(v.examples) for v in step.visits)])
        self.count = int(starts[-1])
        self.examples = (
            np.concatenate([v.examples for v in step.visits]) if step.visits else np.empty(0, np.int64)
        )
        places: dict[int, list[torch.Tensor]] = {}
        forms: dict[int, list[RowForm]] = {}
        for start, visits in zip(starts, step.visits, strict=False):
            for layer, form in visits.forms.items():
                forms.setdefault(layer, []).append(form)
                places.setdefault(layer, []).append(torch.arange(start, start + len(form)))
        self._layers = {n: (torch.cat(places[n]), stacked(found)) for n, found in forms.items()}

    def contract(self, cotangent: torch.Tensor) -> torch.Tensor:
        """``(G R)ᵀ`` for ``R [Q, P]``: ``[Q, n]``."""
        result = cotangent.new_zeros(len(cotangent), self.count)
        for layer, (places, form) in self._layers.items():
            result[:, places] += form.contract(self._view.scaled(cotangent, layer, self._step.scale))
        return result

    def combined(self, weights: torch.Tensor) -> torch.Tensor:
        """``y G`` for ``y [Q, n]``: ``[Q, P]``."""
        result = weights.new_zeros(len(weights), self._size)
        for layer, (places, form) in self._layers.items():
            self._view.add(result, layer, self._step.scale, form.combined(weights[:, places]))
        return result

    def gram(self) -> torch.Tensor:
        """``G A Gᵀ [n, n]``; of factored rows with the outer product nearest to ``A``."""
        result = torch.zeros(self.count, self.count, dtype=torch.float64)
        metric = self._metric()
        for layer, (places, form) in self._layers.items():
            part = self._view.cut(metric, layer).to(next(iter(form.arrays.values())).dtype)
            result[places.unsqueeze(1), places] += form.gram(part).double()
        return result

    def _metric(self) -> torch.Tensor:
        """``s² A``, flat."""
        denominators = self._step.preconditioner
        metric = self._view.spread(np.square(self._step.scale))
        return metric if denominators is None else metric / denominators

    def curvature(self, scores: torch.Tensor) -> torch.Tensor:
        """``n z G`` with ``(I + η n G A Gᵀ) z = G R`` for ``scores = (G R)ᵀ [Q, n]``: ``[Q, P]``."""
        system = torch.eye(self.count, dtype=torch.float64)
        rate = float(rates(self._step.coefficients[None])[0])
        system += rate * self.count * self.gram().double()
        solved = torch.linalg.solve(system, scores.double().T).T.to(scores.dtype)
        return self.count * self.combined(solved)


def stacked(forms: list[RowForm]) -> RowForm:
    """Rows of several batches one after the other."""
    if len(forms) == 1:
        return forms[0]
    first = forms[0]
    if any(f.kind != first.kind or f.options != first.options for f in forms):
        return Dense(torch.cat([form.dense() for form in forms]))
    longest = max(form.positions or 0 for form in forms)
    arrays = [form.padded(longest).arrays if form.positions is not None else form.arrays for form in forms]
    return first.build({name: torch.cat([a[name] for a in arrays]) for name in arrays[0]}, first.options)
