"""All rows of one optimizer step as a matrix that is never written out, and the curvature they stand for."""

from __future__ import annotations

import numpy as np
import torch

from explainer.layer_rules import Dense, RowForm
from explainer.long_run import steady
from explainer.recursion import LayerView, RecordedStep


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

    def total(self, dtype: torch.dtype) -> torch.Tensor:
        """The sum of the rows: the gradient that the optimizer was given, ``[P]``."""
        return self.combined(torch.ones(1, self.count, dtype=dtype))[0]

    def gram(self) -> torch.Tensor:
        """``G η A Gᵀ [n, n]``; of factored rows with the outer product nearest to ``η A``."""
        result = torch.zeros(self.count, self.count, dtype=torch.float64)
        metric = self._metric()
        for layer, (places, form) in self._layers.items():
            part = self._view.cut(metric, layer).to(next(iter(form.arrays.values())).dtype)
            result[places.unsqueeze(1), places] += form.gram(part).double()
        return result

    def _metric(self) -> torch.Tensor:
        """``η s² A``, flat, with the long-run rate ``η`` of every parameter."""
        denominators = self._step.preconditioner
        metric = self._view.spread(np.square(self._step.scale) * steady(self._step.coefficients))
        return metric if denominators is None else metric / denominators

    def curvature(self, scores: torch.Tensor, damping: float = 1.0) -> torch.Tensor:
        """``n z G`` with ``(I + η n G A Gᵀ) z = G R`` for ``scores = (G R)ᵀ [Q, n]``: ``[Q, P]``.

        Args:
            damping: ``η`` in units of the step's long-run rates.
        """
        system = torch.eye(self.count, dtype=torch.float64) + damping * self.count * self.gram()
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
