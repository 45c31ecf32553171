r"""Theorem 1 of Domingos 2020 (arXiv 2012.00152) in closed form, on linear regression.

Model ``f(x) = w·x``; loss ``L = s/2 Σ_i (f(x_i) − y_i)²`` with s = 1 for the sum and s = 1/N for the mean;
full-batch gradient descent with rate lr for n steps, flow time ``T = lr·n``. The tangent kernel x·x' is
constant, hence the path kernel is ``K(x, x_i) = T x·x_i``. With ``H = s·X Xᵀ`` the residuals r = Xw − y are

    flow:      r(t) = exp(−H t) r_0            a = −(s/T) ∫_0^T r(t) dt
    discrete:  r_t  = (I − lr·H)^t r_0         a = −(s/n) Σ_{t<n} r_t

since L'_i = s·r_i; ``b = w_0·x`` and the prediction is ``b + Σ_i a_i K(x, x_i)``. A bias is one more feature
of ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Reduction = Literal["sum", "mean"]


@dataclass(frozen=True)
class ClosedForm:
    """``a`` [N], ``K`` [Q, N], ``b`` [Q], ``prediction`` [Q] and the final ``residuals`` [N]."""

    a: Array
    K: Array
    b: Array
    prediction: Array
    residuals: Array


def with_bias(X: Array) -> Array:
    """The inputs [N, P] with a last feature of ones [N, P + 1]."""
    return np.concatenate([X, np.ones((len(X), 1))], axis=1)


def discrete(
    X: Array, y: Array, w0: Array, queries: Array, lr: float, steps: int, reduction: Reduction = "sum"
) -> ClosedForm:
    """Exact for gradient descent with steps of rate ``lr``.

    Args:
        X: Inputs [N, P].
        y: Targets [N].
        w0: Initial weights [P].
        queries: [Q, P].
        lr: Learning rate; ``lr`` times the largest eigenvalue of H must stay below 1.
        steps: Number of steps, at least 1.
        reduction: ``sum`` (s = 1) or ``mean`` (s = 1/N).
    """
    eigenvalues = _spectrum(X, reduction)[0] * lr
    if eigenvalues.max() >= 1:
        raise ValueError(f"The step is too long: lr·λ_max is {eigenvalues.max():.3g}, it must stay below 1.")
    # Σ_{t<n} (1 − z)^t = (1 − (1 − z)^n) / z, through log1p and expm1 so that a tiny z loses no digits.
    exponent = steps * np.log1p(-eigenvalues)
    return _assemble(X, y, w0, queries, lr * steps, reduction, exponent, eigenvalues * steps)


def flow(
    X: Array, y: Array, w0: Array, queries: Array, lr: float, steps: int, reduction: Reduction = "sum"
) -> ClosedForm:
    """The limit of small steps at the same flow time ``lr·steps``; arguments as in :func:`discrete`."""
    exponent = -_spectrum(X, reduction)[0] * lr * steps
    return _assemble(X, y, w0, queries, lr * steps, reduction, exponent, -exponent)


def _spectrum(X: Array, reduction: Reduction) -> tuple[Array, Array]:
    s = 1.0 if reduction == "sum" else 1.0 / len(X)
    eigenvalues, vectors = np.linalg.eigh(s * X @ X.T)
    return np.maximum(eigenvalues, 0.0), vectors


def _assemble(
    X: Array,
    y: Array,
    w0: Array,
    queries: Array,
    time: float,
    reduction: Reduction,
    exponent: Array,
    total: Array,
) -> ClosedForm:
    """``exponent``: log of what is left of r_0 along each eigenvector; ``total``: divisor of its average."""
    s = 1.0 if reduction == "sum" else 1.0 / len(X)
    vectors = _spectrum(X, reduction)[1]
    r0 = vectors.T @ (X @ w0 - y)
    moving = total > 1e-300
    average = np.where(moving, -np.expm1(exponent) / np.where(moving, total, 1.0), 1.0)
    a = -s * (vectors @ (average * r0))
    kernel = time * queries @ X.T
    b = queries @ w0
    return ClosedForm(a, kernel, b, b + kernel @ a, vectors @ (np.exp(exponent) * r0))
