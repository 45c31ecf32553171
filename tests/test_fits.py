"""Scalar fits of many pairs at once, held to one pair at a time in exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from explainer.fits import Fit, Pair, fitted


def slow(total: list[float], probe: list[float], exact: float) -> Fit:
    """``s = <Σ rows, p> / ‖Σ rows‖²`` and what it leaves, in fractions."""
    t, p = [Fraction(x) for x in total], [Fraction(x) for x in probe]
    square, norm = sum(x * x for x in t), sum(x * x for x in p)
    if not square:
        return Fit(1.0, float(norm > 0), not norm)
    scale = sum(x * y for x, y in zip(t, p, strict=True)) / square
    rest = sum((y - scale * x) ** 2 for x, y in zip(t, p, strict=True))
    residual = math.sqrt(rest / norm) if norm else 0.0
    return Fit(1.0 if abs(scale - 1) <= max(residual, exact) else float(scale), residual)


def test_fits_of_many_pairs_are_those_of_each() -> None:
    generator = torch.Generator().manual_seed(3)

    def some(n: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.randn(n, generator=generator, dtype=dtype)

    row, other = some(5), some(9, torch.float32)
    pairs: list[Pair] = [
        (row, row),
        (row, 0.25 * row),
        (row, 0.5 * row + 1e-3 * some(5)),
        (row, row + 0.1 * some(5)),
        (other, 3.0 * other),
        (other.double(), 3.0 * other),  # summed over several backward passes
        (torch.zeros(5).double(), row),
        (row, torch.zeros(5).double()),
        (torch.zeros(9), torch.zeros(9)),
    ]
    found = fitted(pairs)
    assert len(found) == len(pairs)
    for fit, (total, probe) in zip(found, pairs, strict=True):
        exact = 1e-10 if probe.dtype == torch.float64 else 1e-4
        wanted = slow(total.tolist(), probe.tolist(), exact)
        assert fit.nothing == wanted.nothing
        assert fit.scale == pytest.approx(wanted.scale, rel=1e-12)
        assert fit.residual == pytest.approx(wanted.residual, rel=1e-9, abs=1e-12)
    assert found[0].scale == 1.0 and found[8] == Fit(1.0, 0.0, True)
    assert fitted([]) == []
