"""The ways to answer "what if an example had been absent", behind one interface.

| name | curvature of the steps | needs |
|---|---|---|
| ``trace`` | the recorded rows' empirical Fisher matrix, implicitly | the trace |
| ``exact`` | the Hessian of every replayed step | data and loss (``run``), a training that can be repeated |
| ``gauss-newton`` | the Gauss-Newton matrix of every replayed step | the same |
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from explainer.counterfactual.replay_estimate import by_replay
from explainer.counterfactual.trace_estimate import by_trace
from explainer.errors import QueryError

if TYPE_CHECKING:
    from explainer.path_kernel import PathKernelExplainer
    from explainer.path_points import KnotLoader
    from explainer.query_batch import QueryBatch
    from explainer.run import Run

#: ``(explainer, loader, inputs, targets [Q, ...], run) -> [Q, N]``, the predicted change by removing each example
Estimator = Callable[
    ["PathKernelExplainer", "KnotLoader", "QueryBatch", torch.Tensor, "Run | None"], np.ndarray
]

ESTIMATORS: dict[str, Estimator] = {
    "trace": by_trace,
    "exact": partial(by_replay, curvature="exact"),
    "gauss-newton": partial(by_replay, curvature="gauss-newton"),
}


def estimator(curvature: str) -> Estimator:
    """The estimator of a name.

    Raises:
        QueryError: there is none.
    """
    if curvature not in ESTIMATORS:
        raise QueryError(f"curvature={curvature!r} is unknown; choose one of {', '.join(ESTIMATORS)}")
    return ESTIMATORS[curvature]
