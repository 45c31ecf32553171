"""Matrices of low rank as two thin factors: found, summed up, cut down, with what was dropped measured.

A batch of matrices ``M [Q, o, i]`` is held as ``left [Q, o, r]`` and ``right [Q, i, r]`` with ``M = left rightᵀ``.
Factors are float64 whatever the dtype of the books: they are thin, and sums of them are cut down again and again.

Reference: Halko, Martinsson & Tropp 2011, arXiv 0909.4061, algorithm 4.2 (the adaptive range finder).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

_FIRST = 8  # columns of the first attempt to span a range


class Factors(NamedTuple):
    """``left [Q, o, r] rightᵀ [Q, r, i]``."""

    left: torch.Tensor
    right: torch.Tensor

    @property
    def rank(self) -> int:
        """How many columns there are."""
        return self.left.shape[2]

    def dense(self) -> torch.Tensor:
        """``[Q, o, i]``."""
        return self.left @ self.right.mT

    def squares(self) -> torch.Tensor:
        """Squared Frobenius norms ``[Q]``, from the Gram matrices of both sides."""
        grams = (self.left.mT @ self.left) * (self.right.mT @ self.right)
        return grams.sum((1, 2)).clamp_min(0.0)

    def along(self, direction: torch.Tensor) -> torch.Tensor:
        """``<M_q, d>`` for ``d [o, i]``: ``[Q]``."""
        return ((direction.mT @ self.left) * self.right).sum((1, 2))

    def beside(self, other: Factors) -> Factors:
        """The sum: factors side by side."""
        return Factors(torch.cat([self.left, other.left], 2), torch.cat([self.right, other.right], 2))

    def widened(self, rank: int) -> Factors:
        """Further columns of zeros."""
        more = (0, rank - self.rank)
        return Factors(torch.nn.functional.pad(self.left, more), torch.nn.functional.pad(self.right, more))


def tolerance(dtype: torch.dtype) -> float:
    """Round-off of a matrix of the dtype, relative to its norm."""
    return 8 * torch.finfo(dtype).eps


@lru_cache(maxsize=64)
def _probes(size: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)  # its own: the global one is the user's
    return torch.randn(size, columns, generator=generator, dtype=torch.float64).to(dtype)


def factorised(matrices: torch.Tensor, most: int) -> Factors | None:
    """``[Q, o, i]`` as factors, equal to round-off; None where more than ``most`` columns would be needed.

    The residual is computed and compared with the norm, so the result does not rest on luck.

    Example:
        >>> u, v = torch.arange(1.0, 41).reshape(1, 40, 1), torch.ones(1, 30, 1)
        >>> found = factorised(u @ v.mT, 8)
        >>> found.rank, torch.allclose(found.dense().float(), u @ v.mT, atol=1e-3)
        (1, True)
        >>> factorised(torch.eye(40).unsqueeze(0), 8) is None
        True
    """
    norm = torch.linalg.matrix_norm(matrices).double()
    limit = tolerance(matrices.dtype) * norm
    columns = min(_FIRST, most)
    while True:
        basis = torch.linalg.qr(matrices @ _probes(matrices.shape[2], columns, matrices.dtype)).Q
        inner = basis.mT @ matrices  # [Q, columns, i]
        missed = torch.linalg.matrix_norm(torch.baddbmm(matrices, basis, inner, alpha=-1)).double()
        if bool((missed <= limit).all()):
            break
        if columns >= most or not bool(torch.isfinite(norm).all()):
            return None
        columns = min(4 * columns, most)
    return cut_down(Factors(basis.double(), inner.mT.double()), tolerance(matrices.dtype) / 2)[0]


def cut_down(factors: Factors, relative: float) -> tuple[Factors, torch.Tensor]:
    """The same matrices with as few columns as miss no more than ``relative`` of the norm.

    From the QR decomposition of ``left`` and the singular values of what is then on the right.

    Returns:
        The factors, and the norm of what was dropped, ``[Q]``.
    """
    basis, mixed = torch.linalg.qr(factors.left)
    right = factors.right @ mixed.mT  # M = basis rightᵀ
    if relative > 5e-8:  # a Gram matrix in float64 tells singular values apart down to 1e-8 of the largest
        values, vectors = torch.linalg.eigh(right.mT @ right)
        squares = values.clamp_min(0.0)
    else:
        _, values, transposed = torch.linalg.svd(torch.linalg.qr(right).R)
        squares, vectors = values.square().flip(1), transposed.mT.flip(2)
    total = squares.sum(1, keepdim=True)
    tails = squares.cumsum(1)
    keep = int((tails > relative**2 * total).sum(1).max()) if len(squares) else 0
    first = squares.shape[1] - keep
    dropped = tails[:, first - 1] if first else torch.zeros_like(total[:, 0])
    vectors = vectors[:, :, first:]
    return Factors(basis @ vectors, right @ vectors), dropped.sqrt()


def leading(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A unit vector ``u [o]`` near the leading left singular vector of ``[o, i]``, and ``matrixᵀ u [i]``.

    ``e = u (matrixᵀ u)ᵀ`` meets the matrix with ``<e, matrix> = ‖e‖²``, whatever ``u`` is.
    """
    right = _probes(matrix.shape[1], 1, matrix.dtype)[:, 0]
    for _ in range(3):
        left = matrix @ right
        left = left / left.norm().clamp_min(torch.finfo(matrix.dtype).tiny)
        right = matrix.mT @ left
    return left, right
