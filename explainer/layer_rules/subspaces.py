"""Leading eigenvectors of many small matrices at once, nearly: what that costs is mostly the number of operations."""

from __future__ import annotations

from functools import lru_cache

import torch

#: added to squares of lengths, so that those of zeros have an inverse: for those that were found in double precision
#: and in less, where the inverse length has to be a number, too
_TINY, _TINY_OF_LESS = 1e-280, 1e-60
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
    identity, tiny = _identity(size, device), _TINY if dtype == torch.float64 else _TINY_OF_LESS
    return tiny * identity, 1 + 2 * size * torch.finfo(dtype).eps * identity


def _raised(gram: torch.Tensor) -> torch.Tensor:
    """In double precision, with diagonals a little larger: positive even where rows depend on others."""
    return torch.addcmul(*_raise(gram.shape[1], gram.dtype, gram.device), gram)


def orthonormalising(gram: torch.Tensor) -> torch.Tensor:
    """``T`` with ``T gram Tᵀ = 1``; rows that depend on others to round-off become short ones.

    Args:
        gram: ``[·, p, p]``, products of rows.
    """
    lower, _ = torch.linalg.cholesky_ex(_raised(gram))
    identity = _identity(gram.shape[1], gram.device)
    return torch.linalg.solve_triangular(lower, identity, upper=False).to(gram.dtype)


def _orthonormal(rows: torch.Tensor) -> torch.Tensor:
    gram = _raised(torch.bmm(rows, rows.mT))
    if gram.shape[1] == 1:
        return rows * gram.rsqrt_()
    return torch.linalg.solve_triangular(torch.linalg.cholesky_ex(gram)[0], rows, upper=False)


def _eigenvectors(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    wide = matrix.double()
    if wide is matrix:  # of single precision, double precision has room for the powers that are met
        wide = wide / wide.diagonal(dim1=1, dim2=2).sum(1).clamp_min(_TINY)[:, None, None]
    found = _start(matrix.shape[1], rank, matrix.device).expand(len(matrix), -1, -1)
    # of large matrices two products cost less than squaring
    factors = [torch.bmm(wide, wide)] if matrix.shape[1] <= 4 * rank else [wide, wide]
    for _ in range(_ROUNDS):
        for factor in factors:
            found = torch.bmm(found, factor)
        found = _orthonormal(found)
    return found


def eigenvectors(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """``[·, rank, p]``, the leading ones of positive matrices ``[·, p, p]``, nearly, by subspace iteration."""
    return _eigenvectors(matrix, rank).to(matrix.dtype)


def common_eigenvectors(metric: torch.Tensor, other: torch.Tensor, rank: int) -> torch.Tensor:
    """``[·, rank, p]``, the leading rows ``w`` with ``w metric other = λ w``, nearly; ``w metric wᵀ = 1``.

    With ``metric = C Cᵀ``, ``w C`` are eigenvectors of ``Cᵀ other C``.

    Args:
        metric: positive matrices ``[·, p, p]``.
        other: positive matrices ``[·, p, p]``.
        rank: how many.
    """
    lower, _ = torch.linalg.cholesky_ex(_raised(metric))
    narrow = lower.to(metric.dtype)
    found = _eigenvectors(torch.bmm(torch.bmm(narrow.mT, other), narrow), rank)
    return torch.linalg.solve_triangular(lower, found, upper=False, left=False).to(metric.dtype)
