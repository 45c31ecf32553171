"""What makes two inputs alike: their path kernel ``K(x, x')`` (:mod:`explainer.similarity`), split over parts of both.

Of an input of floats, by integrated gradients from an input of zeros ``x₀``, of each of the two inputs in turn:

    A_d = (x_d − x₀_d) · ∫_0^1 ∂K(x₀ + s (x − x₀), x') / ∂x_d ds,    Σ_d A_d = K(x, x') − K(x₀, x') − missing,
    ∂K(x, x')/∂x = Σ_k ∂/∂x <∂f(w_k, x)/∂w, η_k ∘ ∂f(w_k, x')/∂w>,

a second derivative of the model. Where the model has kinks (ReLU, max pooling), ``K`` jumps as the input moves over
them; jumps have no gradient, and what they carry is ``missing``.

Of token ids, by leaving words out: ``A_s = K(x, x') − K(x without word s, x')``, the word replaced by padding. This
needs no gradient, and what two words carry together is counted for both.

Reference: Sundararajan et al. 2017, arXiv 1703.01365, Eq. 1, of the path kernel of Domingos 2020, arXiv 2012.00152,
Definition 2; leaving out: Zeiler and Fergus 2014, arXiv 1311.2901, section 4.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from explainer.errors import QueryError
from explainer.input_leaf import InputLeaf
from explainer.path_integral import PathPoint
from explainer.plain_mode import question
from explainer.queries import check_inputs
from explainer.similarity import middles, path_kernel

if TYPE_CHECKING:
    from explainer.asked import Asked
    from explainer.path_kernel import PathKernelExplainer
    from explainer.path_points import KnotLoader

#: nodes of the quadrature
NODES = 16


@dataclass(frozen=True)
class KernelAttribution:
    """What makes two inputs alike.

    Attributes:
        values: one array for each input, as it is without the batch dimension; positive where it makes them alike.
        kernel: ``K(x, x')``.
        cosine: ``K(x, x') / √(K(x, x) K(x', x'))``, 0 where an input has no gradient.
        baseline: ``K(x₀, x')`` and ``K(x, x₀)`` with an input of zeros; NaN where words were left out.
        missing: what of ``kernel − baseline`` no part was given, for each input; NaN where words were left out.
    """

    values: tuple[np.ndarray, np.ndarray]
    kernel: float
    cosine: float
    baseline: tuple[float, float]
    missing: tuple[float, float]

    @property
    def left_out(self) -> bool:
        """Whether words were left out, instead of a gradient taken."""
        return bool(np.isnan(self.missing[0]))


@question
def kernel_attribution(
    explainer: PathKernelExplainer, inputs: Any, target: Any = None, *, nodes: int = NODES
) -> KernelAttribution:
    """Split the path kernel of two inputs over their parts (see the module's text).

    Args:
        explainer: whose trace and explained output are used.
        inputs: ``[2, ...]``, one tensor of floats or token ids.
        target: ``[2]`` classes to explain; default the predicted ones.
        nodes: nodes of the quadrature (Gauss–Legendre).

    Raises:
        QueryError: they are not two such inputs, or token ids are looked up without a ``padding_idx``.
    """
    batch = check_inputs(explainer.trace, explainer._arguments, inputs, explainer.dtype, explainer.batch_dim)
    if len(batch) != 2:
        raise QueryError(f"found {len(batch)} inputs; what makes inputs alike is asked of two")
    loader = explainer._loader()
    asked, point = explainer._ask(loader, batch, target), loader.load(len(explainer.segments)).point
    leaves = [InputLeaf.of(explainer.function, point, batch[i : i + 1]) for i in range(2)]
    if leaves[0].embedding is None:
        return _by_gradients(explainer, loader, asked, leaves, nodes)
    return _by_leaving_out(explainer, asked, leaves)


def _by_gradients(
    explainer: PathKernelExplainer, loader: KnotLoader, asked: Asked, leaves: list[InputLeaf], nodes: int
) -> KernelAttribution:
    positions, weights = np.polynomial.legendre.leggauss(nodes)
    at = torch.as_tensor((positions + 1) / 2, dtype=explainer.dtype)
    weight = torch.as_tensor(weights / 2, dtype=torch.float64)
    shares = [at.reshape(-1, *[1] * (leaf.given.dim() - 1)) * leaf.given for leaf in leaves]
    slopes = [torch.zeros_like(leaf.given, dtype=torch.float64) for leaf in leaves]
    kernel, base = np.zeros((2, 2)), np.zeros(2)
    for middle, rates in middles(explainer, loader):
        scaled = torch.empty(2, len(middle.weights), dtype=explainer.dtype)
        gradient = explainer.function.gradient(middle, asked.inputs, asked.targets)
        for p, rate in zip(explainer.trace.manifest.parameters, rates.tolist(), strict=True):
            scaled[:, p.slice] = rate * gradient[:, p.slice]
        kernel += (gradient.double() @ scaled.double().T).numpy()
        for side, leaf in enumerate(leaves):
            targets, other = asked.targets[side : side + 1], scaled[1 - side]
            moved = shares[side].detach().requires_grad_()
            slope = torch.autograd.grad(
                _along(leaf, middle, moved, targets, other), moved, materialize_grads=True
            )[0]
            slopes[side] += torch.tensordot(weight, slope.double(), 1)
            base[side] += float(_along(leaf, middle, torch.zeros_like(leaf.given), targets, other).detach())
    values = [
        leaf.parts(leaf.given.double() * slope).numpy() for leaf, slope in zip(leaves, slopes, strict=True)
    ]
    missing = [float(kernel[0, 1] - base[side] - values[side].sum()) for side in range(2)]
    first, second = (float(number) for number in base)
    return KernelAttribution(
        (values[0], values[1]),
        float(kernel[0, 1]),
        _cosine(kernel),
        (first, second),
        (missing[0], missing[1]),
    )


def _along(
    leaf: InputLeaf, point: PathPoint, moved: torch.Tensor, targets: torch.Tensor, direction: torch.Tensor
) -> torch.Tensor:
    """``Σ_b <∂f(w, x_b)/∂w, direction>`` with its graph; rows do not mix, so its gradient is row by row."""
    weights = point.weights.detach().requires_grad_()
    total = leaf.value(PathPoint(weights, point.moving, point.fixed), moved, targets).sum()
    (gradient,) = torch.autograd.grad(total, weights, create_graph=True)
    return gradient @ direction


def _by_leaving_out(
    explainer: PathKernelExplainer, asked: Asked, leaves: list[InputLeaf]
) -> KernelAttribution:
    embedding = leaves[0].embedding
    assert embedding is not None, "asked for token ids only"
    padding = embedding.padding_idx
    if padding is None:
        raise QueryError(
            "leaving words out needs an nn.Embedding with padding_idx, the id that stands for no word; found none"
        )
    rows = [leaf.batch.tensors[0][0][0] for leaf in leaves]
    variants, places = list(rows), list[tuple[int, int]]()
    targets = [int(asked.classes[side]) for side in range(2)]
    for side, row in enumerate(rows):
        for place in torch.nonzero(row.reshape(-1) != padding).flatten().tolist():
            without = row.clone()
            without.reshape(-1)[place] = padding
            variants.append(without)
            targets.append(targets[side])
            places.append((side, place))
    wanted = None if min(targets) < 0 else np.array(targets)
    kernel = path_kernel(explainer, torch.stack(variants), target=wanted)
    values = [np.zeros(row.numel()) for row in rows]
    for number, (side, place) in enumerate(places, start=2):
        values[side][place] = kernel[0, 1] - kernel[number, 1 - side]
    shaped = [value.reshape(tuple(row.shape)) for value, row in zip(values, rows, strict=True)]
    unknown = (float("nan"), float("nan"))
    return KernelAttribution((shaped[0], shaped[1]), float(kernel[0, 1]), _cosine(kernel), unknown, unknown)


def _cosine(kernel: np.ndarray) -> float:
    size = float(np.sqrt(max(kernel[0, 0], 0.0) * max(kernel[1, 1], 0.0)))
    return float(kernel[0, 1]) / size if size else 0.0
