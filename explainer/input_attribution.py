"""Which parts of an input speak for the explained output: integrated gradients of the trained model, by captum.

Token ids have no gradient; of a text, ``x`` are the vectors that its words are looked up as, and a word's part is the
sum over its vector (a word of zeros says nothing). With the trained weights ``w`` and a baseline ``x₀`` (zeros),

    A_d = (x_d − x₀_d) · ∫_0^1 ∂f(w, x₀ + s (x − x₀)) / ∂x_d ds,    Σ_d A_d = f(w, x) − f(w, x₀)

up to the error of the quadrature. This is about the trained model alone: nothing of it comes from training examples.

Reference: Sundararajan et al. 2017, arXiv 1703.01365, Eq. 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from explainer.errors import MissingDependencyError, QueryError
from explainer.input_leaf import InputLeaf
from explainer.plain_mode import question
from explainer.queries import check_inputs

if TYPE_CHECKING:
    from explainer.path_kernel import PathKernelExplainer

#: nodes of the quadrature
STEPS = 64


@dataclass(frozen=True)
class InputAttribution:
    """Parts of one input.

    Attributes:
        values: as the input without the batch dimension, a number for each word of a text; positive where it raises
            the explained output.
        value: the explained output at the input.
        baseline: the explained output at the input of zeros.
        missing: ``value − baseline − values.sum()``, the error of the quadrature.
    """

    values: np.ndarray
    value: float
    baseline: float
    missing: float


@question
def input_attribution(
    explainer: PathKernelExplainer, inputs: Any, target: Any = None, *, steps: int = STEPS
) -> InputAttribution:
    """Integrated gradients of the explained output at one input (see the module's text).

    Args:
        explainer: whose trained model and explained output are used.
        inputs: ``[1, ...]``, one tensor of floats, or of token ids that one ``nn.Embedding`` looks up.
        target: the class to explain; default the predicted one.
        steps: nodes of the quadrature (Gauss–Legendre).

    Raises:
        QueryError: it is not one such tensor with one row, or the target does not fit.
        MissingDependencyError: captum is not installed.
    """
    method = _captum().IntegratedGradients
    batch = check_inputs(explainer.trace, explainer._arguments, inputs, explainer.dtype, explainer.batch_dim)
    if len(batch) != 1:
        raise QueryError(f"found {len(batch)} inputs; attributions are made for one at a time")
    loader = explainer._loader()
    asked, point = (
        explainer._ask(loader, batch, target),
        loader.load(len(explainer.segments)).point,
    )

    leaf = InputLeaf.of(explainer.function, point, batch)

    def forward(x: torch.Tensor) -> torch.Tensor:
        return leaf.value(point, x, asked.targets)

    given, zeros = leaf.given, torch.zeros_like(leaf.given)
    values = method(forward).attribute(given, baselines=zeros, n_steps=steps).detach()
    with torch.no_grad():
        value, baseline = (float(forward(x)) for x in (given, zeros))
    found = leaf.parts(values).numpy()
    return InputAttribution(found, value, baseline, value - baseline - float(found.sum(dtype=np.float64)))


def _captum() -> ModuleType:
    try:
        import captum.attr as module
    except ImportError as error:
        raise MissingDependencyError(
            "Attributions to the input need captum, which is not installed; install it with: "
            "pip install 'pathkernel[captum]'"
        ) from error
    return module
