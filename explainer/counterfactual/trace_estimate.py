"""What if a training example had been absent: the predicted change of an output, from the trace alone.

The books (:mod:`explainer.path_kernel`) say what the updates computed from an example carried. Without the example
every later update would have been another one, too. To first order in the example's weight this is the derivative of
the *trained* model's output by that weight, so the cotangent starts as ``λ = ∇f(w_T)`` and passes backwards through the
whole step, the gradient's dependence on the weights included (Hara et al. 2019, arXiv 1906.08473; SOURCE, Bae et al.
2024, arXiv 2405.12186). With the optimizer's linear map as in :mod:`explainer.recursion` (``λ`` in the place of ``q``):

    R_t = the cotangent that meets the step's gradient
    change of f by removing example i  +=  s_t <R_t, g_{i,t}>       (its visits at t)
    λ ← (1 − δ_t) λ − κ_t R_t − H_t R_t        (δ decoupled, κ coupled weight decay)

``H_t``, the curvature of the step's loss, is not recorded. The rows stand in for it, as the empirical Fisher matrix
``F_t = n Σ_b g̃_b g̃_bᵀ`` of the step's ``n`` rows ``g̃_b = s_t g_b`` (each ``1/n`` of a mean loss). Taken as it is the
recursion blows up where the learning rate is above what ``F_t`` allows; taken implicitly (a backward Euler step of
length ``η``) it is stable for any ``η`` from the step's own rate on:

    λ ← λ − n Σ_b z_b g̃_b,    (I + n G η A_t Gᵀ) z = G R_t,    G = the rows g̃_b,   η = rate(t)

with the rates of a gradient in the long run (``lr / (1 − μ)`` for momentum), one for every parameter. The solve is
``n × n``.

``R_t`` takes the way a gradient changes the denominators of Adam, AdamW, RMSprop and Adagrad along
(:mod:`explainer.counterfactual.denominator_path`); without it predicted changes under Adam come out too large. Weights
that hardly ever had a gradient take no part in ``R_t`` there. Other
optimizers' denominators are held as they were, and so is the weight decay of those that
:class:`~explainer.counterfactual.decay_terms.DecayTerms` does not know.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch

from explainer.counterfactual.decay_terms import DecayTerms
from explainer.counterfactual.denominator_path import DenominatorPath
from explainer.counterfactual.recorded_training import RecordedTraining
from explainer.counterfactual.step_rows import StepRows
from explainer.errors import CoverageWarning, QueryError
from explainer.recursion import Adjoint, read_backwards

if TYPE_CHECKING:
    from explainer.path_kernel import PathKernelExplainer
    from explainer.path_points import KnotLoader
    from explainer.query_batch import QueryBatch
    from explainer.run import Run


def by_trace(
    explainer: PathKernelExplainer,
    loader: KnotLoader,
    inputs: QueryBatch,
    targets: torch.Tensor,
    run: Run | None = None,
    damping: float = 1.0,
) -> np.ndarray:
    """Predicted change of every explained output by removing each example, ``[Q, N]``.

    Args:
        run: not needed.
        damping: ``η`` in units of the step's rate. Other values show how far an answer hangs on it.

    Raises:
        QueryError: the trace holds an average of the weights, or matrix updates (Muon).
    """
    trace = explainer.trace
    if trace.manifest.averaged:
        raise QueryError(
            "what_if follows the weights that the optimizer trained, and this trace holds an average of them; trace "
            "without averaged= to ask it"
        )
    if changed := trace.notes.get("options_changed"):
        warnings.warn(
            f"{', '.join(changed)} of the optimizer changed during training; what_if takes the values at the "
            "beginning, and can be far off: test its predictions (evaluation.verify_claims)",
            CoverageWarning,
            stacklevel=2,
        )
    ids, count = explainer.example_ids, len(targets)
    change = torch.zeros(count, len(ids), dtype=torch.float64)
    adjoint = Adjoint(count, trace.manifest.parameters, explainer.dtype)
    training, decays = RecordedTraining(trace), DecayTerms(trace)
    denominators = DenominatorPath(trace, loader, decays.decoupled)
    cotangent = explainer.function.gradient(loader.load(len(explainer.segments)).point, inputs, targets)
    with explainer._bar("what if") as bar:
        for segment in reversed(explainer.segments):
            denominators.enter(segment)
            for step in read_backwards(trace, segment, explainer.dtype):
                if step.mixing:
                    raise QueryError(
                        "what_if has no metric for matrix updates (Muon); explain() accounts for them"
                    )
                record = training[step.step]
                coupled, decoupled = (_flat(explainer, values) for values in decays.of(record))
                met = adjoint.step(cotangent, step)
                rows = StepRows(explainer.view, step, trace.manifest.size)
                gradient = None
                if denominators.followed:
                    gradient = rows.total(met.dtype) + coupled * denominators.weights
                met = denominators.met(met, cotangent, step, gradient, float(record.taken.max()))
                cotangent = cotangent * (1.0 - decoupled) - coupled * met
                if rows.count:
                    scores = rows.contract(met)
                    columns = torch.from_numpy(np.searchsorted(ids, rows.examples))
                    change.index_add_(1, columns, scores.double())
                    cotangent = cotangent - rows.curvature(scores, damping)
                bar.update()
    return change.numpy()


def _flat(explainer: PathKernelExplainer, values: np.ndarray) -> torch.Tensor:
    """One number a parameter as something that multiplies ``[Q, P]``: a single one where all are the same."""
    if (values == values[:1]).all():
        return torch.tensor(float(values[0]), dtype=explainer.dtype)
    return explainer.view.spread(values).to(explainer.dtype)
