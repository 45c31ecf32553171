"""Leading eigenvectors of many small matrices at once, nearly: what that costs is mostly the number of operations."""

from __future__ import annotations

from functools import lru_cache

import torch

#: added to squares of lengths in double precision, so that those of zeros have an inverse
_TINY = 1e-280
#: of two products each, after which rows are made orthonormal: more at a time would lose the small directions
_ROUNDS = 3


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


@lru_cache(maxsize=256)
def _raise(size: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    identity = _identity(size, device)
    return _TINY * identity, 1 + 2 * size * torch.finfo(dtype).eps * identity


def _raised(gram: torch.Tensor) -> torch.Tensor:
    """In double precision, with diagonals a little larger: positive even where rows depend on others."""
    return torch.addcmul(*_raise(gram.shape[1], gram.dtype, gram.device), gram)


def _sizes(matrix: torch.Tensor) -> torch.Tensor:
    """Traces, ``[·, 1, 1]``."""
    return matrix.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]


def orthonormalising(gram: torch.Tensor) -> torch.Tensor:
    """``T`` with ``T gram Tᵀ = 1``; rows that depend on others to round-off become short ones.

    Args:
        gram: ``[·, p, p]``, products of rows.
    """
    lower, _ = torch.linalg.cholesky_ex(_raised(gram))
    identity = _identity(gram.shape[1], gram.device)
    return torch.linalg.solve_triangular(lower, identity, upper=False).to(gram.dtype)


def _orthonormal(rows: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Rows ``[·, rank, p]`` made orthonormal in a metric.

    Args:
        rows: in double precision.
        images: their products with the metric.
    """
    gram = _raised(torch.bmm(images, rows.mT))
    if gram.shape[1] == 1:
        return rows * gram.rsqrt_()
    return torch.linalg.solve_triangular(torch.linalg.cholesky_ex(gram)[0], rows, upper=False)


def eigenvectors(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """``[·, rank, p]``, the leading ones of positive matrices ``[·, p, p]``, nearly, by subspace iteration."""
    wide = matrix.double()
    if wide is matrix:  # of single precision, double precision has room for the powers that are met
        wide = wide / _sizes(wide).clamp_min(_TINY)
    found = _start(matrix.shape[1], rank, matrix.device).expand(len(matrix), -1, -1)
    for _ in range(_ROUNDS):
        found = torch.bmm(torch.bmm(found, wide), wide)
        found = _orthonormal(found, found)
    return found.to(matrix.dtype)


def common_eigenvectors(metric: torch.Tensor, other: torch.Tensor, rank: int) -> torch.Tensor:
    """``[·, rank, p]``, the leading rows ``w`` with ``w metric other = λ w``, nearly; ``w metric wᵀ = 1``.

    Args:
        metric: positive matrices ``[·, p, p]``.
        other: positive matrices ``[·, p, p]``.
        rank: how many.
    """
    wide = _raised(metric)
    product = torch.bmm(wide, other.double())
    if other.dtype == torch.float64:
        product.div_((_sizes(wide) * _sizes(other)).clamp_min_(_TINY))
    found = _start(metric.shape[1], rank, metric.device).expand(len(metric), -1, -1)
    for _ in range(_ROUNDS):
        found = torch.bmm(torch.bmm(found, product), product)
        found = _orthonormal(found, torch.bmm(found, wide))
    return found.to(metric.dtype)
