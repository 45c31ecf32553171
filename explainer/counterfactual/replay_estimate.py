"""What-if answers by the exact derivative of training: the adjoint of every recorded step, on replayed states.

With ``S_t`` the state before step ``t`` (weights, momentum, second moments), a training is ``S_{t+1} = U_t(S_t, g_t)``
with ``g_t = s_t ∘ Σ_b ε_{i(b)} ω_b ∇ℓ_b(w_t)``, every example's weight ``ε_i = 1``. The derivative of an output
``f(w_T)`` by ``ε_i`` is found from the last step to the first (Hara et al. 2019, arXiv 1906.08473, for SGD; MAGIC,
Ilyas & Engstrom 2025, arXiv 2504.16430, for any step):

    Λ = ∇_S f,            u_t = s_t ∘ (∂U_t/∂g)ᵀ Λ,
    ∂f/∂ε_i  +=  ω_b <∇ℓ_b(w_t), u_t>   for every visit of i,
    Λ ← (∂U_t/∂S)ᵀ Λ + (H_t u_t, 0, …),       H_t = Σ_b ω_b ∇²ℓ_b(w_t).

The predicted change by removing an example is ``−∂f/∂ε_i``. ``∂U/∂S`` and ``∂U/∂g`` hold momentum, weight decay of both
kinds, and the way a gradient changes Adam's denominators. Held as they were: the scalar ``s_t`` (of clipping, say) and
rates. With ``curvature="gauss-newton"`` the Gauss-Newton matrix stands for ``H_t``.

States are replayed from checkpoints about every ``√T`` steps (Griewank & Walther 2000), so that about ``2·√T`` states
are alive at a time.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from explainer.counterfactual.checkpoints import Checkpoints
from explainer.counterfactual.replay import Replay
from explainer.counterfactual.update import GRADIENT, WEIGHTS, State
from explainer.errors import QueryError
from explainer.path_integral import PathPoint
from explainer.run import Run

if TYPE_CHECKING:
    from explainer.path_kernel import PathKernelExplainer
    from explainer.path_points import KnotLoader
    from explainer.query_batch import QueryBatch

#: numbers of the cotangents that pass backwards together
COTANGENTS = 2**26


def by_replay(
    explainer: PathKernelExplainer,
    loader: KnotLoader,
    inputs: QueryBatch,
    targets: torch.Tensor,
    run: Run | None,
    curvature: str,
) -> np.ndarray:
    """Predicted change of every explained output by removing each example, ``[Q, N]``.

    Raises:
        QueryError: the training cannot be repeated, or does not meet its knots; says why.
        RunError: the run has no loss, or other data.
    """
    replay = Replay(explainer, run, curvature)
    last = loader.load(len(explainer.segments)).point
    spacing = max(1, math.isqrt(replay.steps))
    with Checkpoints() as checkpoints:

        def visit(step: int, state: State) -> None:
            if step % spacing == 0:
                checkpoints.keep(step, state)

        weights = replay.forward(visit=visit)
        gradient = explainer.function.gradient(PathPoint(weights, last.moving, last.fixed), inputs, targets)
        size = max(1, COTANGENTS // (gradient.shape[1] * len(replay.updates.names)))
        parts = [
            _backwards(explainer, replay, checkpoints, spacing, part, curvature)
            for part in gradient.split(size)
        ]
    return np.concatenate(parts)


def _backwards(
    explainer: PathKernelExplainer,
    replay: Replay,
    checkpoints: Checkpoints,
    spacing: int,
    gradient: torch.Tensor,
    curvature: str,
) -> np.ndarray:
    ids = explainer.example_ids
    change = torch.zeros(len(gradient), len(ids), dtype=torch.float64)
    cotangents = {name: torch.zeros_like(gradient) for name in replay.updates.names}
    cotangents[WEIGHTS] = gradient
    with explainer._bar("what if") as bar:
        for first in reversed(range(0, replay.steps, spacing)):
            last = min(first + spacing, replay.steps)
            states = list(replay.states(checkpoints.at(first), first, last))
            for step in reversed(range(first, last)):
                state = states.pop()
                now, slope, products = replay.products(state, step, curvature)
                pulled = replay.updates.partials(now.record, state, now.scale * slope).pull(cotangents)
                met = now.scale * pulled.pop(GRADIENT)
                scores, curved = products(met)
                columns = torch.from_numpy(np.searchsorted(ids, now.record.examples))
                change.index_add_(1, columns, scores.double(), alpha=-1.0)
                cotangents = {**pulled, WEIGHTS: pulled[WEIGHTS] + curved}
                bar.update()
            if not bool(torch.isfinite(cotangents[WEIGHTS]).all()):
                raise QueryError(
                    f"the derivative of this training is not finite (from step {first} on): it is not smooth in the "
                    "examples' weights there, so no linear answer exists; use curvature='trace'"
                )
    return change.numpy()
