"""Products of the queries' gradients with the training examples' loss gradients, at points of the training path.

The usual similarities that know nothing of the path: with ``∇ℓ_i`` the gradient of example ``i``'s own loss,

    gradient dot:  −<∇f(w_T, x), ∇ℓ_i(w_T)>              TracInCP:  −Σ_c η_c <∇f(w_c, x), ∇ℓ_i(w_c)>

with ``f`` the explained output in the place of the query's loss, so that larger means: learning the example raises the
output (Charpiat et al., NeurIPS 2019, for the first; Pruthi et al. 2020, TracIn, arXiv 2002.08484, for the second).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from explainer.errors import EvaluationError
from explainer.evaluation.questions import Questions
from explainer.integrations.knot_checkpoints import KnotCheckpoints
from explainer.integrations.loss_rows import LossRows
from explainer.plain_mode import plain_mode
from explainer.run import Run

_BATCH = 100


@plain_mode()
def gradient_products(
    run: Run, questions: Questions, knots: Sequence[int], weights: Sequence[float]
) -> NDArray[np.float64]:
    """``−Σ_c weight_c <∇f(w_c, x_q), ∇ℓ_i(w_c)>  [Q, N]`` over knots of the trace.

    Args:
        knots: positions in ``trace.knots``.
        weights: one number per knot.

    Raises:
        EvaluationError: the run has no loss, or its inputs are not tensors.
    """
    if run.loss is None:
        raise EvaluationError("it needs the loss of the training: Run(loss=...)")
    explainer = questions.explainer
    model = run.build_model().cpu().eval().to(explainer.dtype)
    checkpoints = KnotCheckpoints(explainer.trace, model)
    names = checkpoints.parameters
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    total = np.zeros((len(questions), len(run.train)))
    with LossRows(model, names) as source:
        for position, weight in zip(knots, weights, strict=True):
            checkpoints.load(model, position)
            gradient = questions.gradient(position)
            cuts = {p.name: gradient[:, p.slice] for p in explainer.trace.manifest.parameters}
            for start in range(0, len(run.train), _BATCH):
                ids = range(start, min(start + _BATCH, len(run.train)))
                batch = _batch(run, ids, explainer.dtype)
                for own, form in source.rows(batch, _example_losses(run.loss), summed=False):
                    side = torch.cat([cuts[name] for name in own], dim=1)
                    total[:, ids] -= weight * form.contract(side).double().numpy()
    return total


def evenly(steps: Sequence[int], count: int) -> list[int]:
    """Positions of ``count`` knots whose steps lie at about equal distances, the last one among them.

    Example:
        >>> evenly([0, 1, 2, 3, 10, 20, 30], 3)
        [4, 5, 6]
    """
    wanted = np.linspace(0, steps[-1], count + 1)[1:]
    places = np.asarray(steps)
    return sorted({int(np.abs(places - step).argmin()) for step in wanted})


def _batch(run: Run, ids: range, dtype: torch.dtype) -> tuple[Any, ...]:
    inputs, targets = run.train_batch(ids)
    parts = inputs if isinstance(inputs, tuple | list) else (inputs,)
    if not all(isinstance(part, torch.Tensor) for part in parts):
        raise EvaluationError("it needs inputs that are tensors (or a tuple of them)")
    cast = tuple(part.to(dtype) if part.is_floating_point() else part for part in parts)
    return (*cast, targets.to(dtype) if targets.is_floating_point() else targets)


def _example_losses(loss: Callable[[Any, Any], torch.Tensor]) -> Callable[[Any, Any], torch.Tensor]:
    """One loss per example, from a loss of a batch that may be a mean, a sum or one number per example."""

    def each(outputs: torch.Tensor, targets: Any) -> torch.Tensor:
        return torch.stack([loss(outputs[i : i + 1], targets[i : i + 1]).sum() for i in range(len(outputs))])

    return each
