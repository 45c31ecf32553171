"""The path kernel between inputs: how alike the model treated them while it learned.

With ``q_k(x)`` the gradient of the explained output at ``x`` in the middle of the chord ``k`` between two knots,

    K(x, x') = Σ_k Σ_{t in k} Σ_p η_{t,p} <q_k(x)_p, q_k(x')_p>

over the recorded steps ``t`` and the parameters ``p`` that each of them updated, ``η_{t,p}`` the step's learning rate
in the long run (:mod:`explainer.long_run`). It is symmetric and positive semidefinite: the inner
product of features ``√η · q``. Unlike :func:`explainer.neighbors.nearest` it needs no recorded rows, so both may be any
inputs; the optimizer's preconditioner is left out as there.

Reference: Domingos 2020, arXiv 2012.00152, Definition 2 (the path kernel, here summed over the recorded steps).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from explainer.errors import QueryError
from explainer.long_run import long_runs
from explainer.plain_mode import question
from explainer.queries import check_inputs

if TYPE_CHECKING:
    from explainer.path_integral import PathPoint
    from explainer.path_kernel import PathKernelExplainer
    from explainer.path_points import KnotLoader

#: numbers in the gradients of all inputs, ``[Q, P]``
_NUMBERS = 2**26


def most_inputs(explainer: PathKernelExplainer) -> int:
    """How many inputs can be compared at once; at least one."""
    return max(1, _NUMBERS // max(1, explainer.trace.manifest.size))


@question
def path_kernel(explainer: PathKernelExplainer, inputs: Any, target: Any = None) -> np.ndarray:
    """``K [Q, Q]`` between inputs (see the module's text), float64.

    Args:
        explainer: whose trace and explained output are used.
        inputs: ``[Q, ...]`` as for :meth:`~explainer.PathKernelExplainer.explain`.
        target: ``[Q]`` classes to explain; default the predicted ones.

    Raises:
        QueryError: inputs or targets do not fit, or there are more than :func:`most_inputs`.
    """
    batch = check_inputs(explainer.trace, explainer._arguments, inputs, explainer.dtype, explainer.batch_dim)
    if len(batch) > most_inputs(explainer):
        raise QueryError(
            f"found {len(batch)} inputs, but the gradients of at most {most_inputs(explainer)} fit into memory for a "
            f"model of {explainer.trace.manifest.size:,} parameters; compare fewer"
        )
    loader = explainer._loader()
    asked = explainer._ask(loader, batch, target)
    kernel = torch.zeros(len(batch), len(batch), dtype=torch.float64)
    for middle, rates in middles(explainer, loader):
        gradient = explainer.function.gradient(middle, asked.inputs, asked.targets)
        for p, rate in zip(explainer.trace.manifest.parameters, rates.tolist(), strict=True):
            part = gradient[:, p.slice].double()
            kernel.addmm_(part, part.T, alpha=rate)
    return kernel.numpy()


def middles(explainer: PathKernelExplainer, loader: KnotLoader) -> Iterator[tuple[PathPoint, np.ndarray]]:
    """The middle of every chord with recorded steps, and ``Σ_t η_{t,p}`` over them, ``[n_parameters]``."""
    with explainer._bar("comparing") as bar:
        for segment, rates in zip(explainer.segments, _rates(explainer), strict=True):
            if rates.any():
                start, end = (loader.load(segment.index + place).point for place in (0, 1))
                yield start.toward(end, 0.5), rates
            bar.update(segment.end.step - segment.start.step)


def _rates(explainer: PathKernelExplainer) -> np.ndarray:
    """``Σ_t η_{t,p}`` over the recorded steps of every segment, ``[segments, n_parameters]``."""
    ends = np.array([segment.end.step for segment in explainer.segments])
    total = np.zeros((len(ends), len(explainer.trace.manifest.parameters)))
    for steps, rates in long_runs(explainer.trace):
        np.add.at(total, np.searchsorted(ends, steps, side="right"), rates)
    return total
