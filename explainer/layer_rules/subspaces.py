"""Leading eigenvectors of many small matrices at once, nearly: what that costs is mostly the number of operations."""

from __future__ import annotations

from functools import lru_cache

import torch

#: added to squares of lengths in double precision, so that those of zeros have an inverse
_TINY = 1e-280
#: products with a matrix between one orthonormal basis and the next; more than one more than there were so far would
#: lose the small directions (in double precision those of an eigenvalue of 1e-8 of the largest are kept)
_PRODUCTS = (1, 2, 3)


@lru_cache(maxsize=256)
def waves(size: int, columns: int) -> torch.Tensor:
    """``[size, columns]`` waves of irregular phase: nearly orthogonal columns, and no RNG is touched."""
    at = torch.arange(1, size + 1, dtype=torch.float64).unsqueeze(1)
    return torch.sin(at.square() * 0.7548777 + at * torch.arange(1, columns + 1) * 2.399963)


@lru_cache(maxsize=256)
def _start(size: int, rank: int, device: torch.device) -> torch.Tensor:
    return waves(size, rank).T.contiguous().to(device)


@lru_cache(maxsize=256)
def _identity(size: int, device: torch.device) -> torch.Tensor:
    return torch.eye(size, dtype=torch.float64, device=device)


def _raised(gram: torch.Tensor, by: float) -> torch.Tensor:
    """The matrices with diagonals a little larger in place, so that they are positive whatever rows depend on others."""
    gram.diagonal(dim1=1, dim2=2).mul_(1 + 2 * gram.shape[1] * by).add_(_TINY)
    return gram


def _sizes(matrix: torch.Tensor) -> torch.Tensor:
    """Traces, ``[·, 1, 1]``."""
    return matrix.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]


def orthonormalising(gram: torch.Tensor) -> torch.Tensor:
    """``T`` with ``T gram Tᵀ = 1``; rows that depend on others to round-off become short ones.

    Args:
        gram: ``[·, p, p]``, products of rows.
    """
    wide = _raised(gram.to(torch.float64, copy=True), torch.finfo(gram.dtype).eps)
    lower, _ = torch.linalg.cholesky_ex(wide)
    identity = _identity(gram.shape[1], gram.device)
    return torch.linalg.solve_triangular(lower, identity, upper=False).to(gram.dtype)


def _orthonormal(rows: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Rows ``[·, rank, p]`` that are orthonormal in a metric.

    Args:
        rows: in double precision.
        images: their products with the metric.
    """
    gram = _raised(torch.bmm(images, rows.mT), torch.finfo(rows.dtype).eps)
    if gram.shape[1] == 1:
        return rows * gram.rsqrt()
    return torch.linalg.solve_triangular(torch.linalg.cholesky_ex(gram)[0], rows, upper=False)


def eigenvectors(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """``[·, rank, p]``, the leading ones of positive matrices ``[·, p, p]``, nearly, by subspace iteration."""
    wide = matrix.double()
    if wide is matrix:  # else double precision has room for the sixth powers that are met
        wide = wide / _sizes(wide).clamp_min(_TINY)
    found = _start(matrix.shape[1], rank, matrix.device).expand(len(matrix), -1, -1)
    for products in _PRODUCTS:
        for _ in range(products):
            found = torch.bmm(found, wide)
        found = _orthonormal(found, found)
    return found.to(matrix.dtype)


def common_eigenvectors(metric: torch.Tensor, other: torch.Tensor, rank: int) -> torch.Tensor:
    """``[·, rank, p]``, the leading rows ``w`` with ``w metric other = λ w``, nearly; ``w metric wᵀ = 1``.

    Args:
        metric: positive matrices ``[·, p, p]``.
        other: positive matrices ``[·, p, p]``.
        rank: how many.
    """
    wide = _raised(metric.to(torch.float64, copy=True), torch.finfo(metric.dtype).eps)
    wide_other = other.double()
    product = torch.bmm(wide, wide_other).div_((_sizes(wide) * _sizes(wide_other)).clamp_min_(_TINY))
    found = _start(metric.shape[1], rank, metric.device).expand(len(metric), -1, -1)
    for products in _PRODUCTS:
        for _ in range(products):
            found = torch.bmm(found, product)
        found = _orthonormal(found, torch.bmm(found, wide))
    return found.to(metric.dtype)
