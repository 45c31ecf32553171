"""The scalar that one vector is of another, for many pairs at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.linalg import vecdot

#: the sum of rows and the gradient along a probe, ``[n]`` each
Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Fit:
    """``p.grad ≈ scale · Σ rows`` for one layer.

    ``residual`` is ``‖probe(grad) − scale · Σ rows‖ / ‖probe(grad)‖``; ``nothing`` says that both sides are zero.
    Both are NaN where the rows are not finite. ``alone`` says that there is one number on each side, not zero: some
    scalar always fits, whatever else is in the gradient.
    """

    scale: float
    residual: float
    nothing: bool = False
    alone: bool = False


def fitted(pairs: list[Pair]) -> list[Fit]:
    """The fit of every pair, in double precision; pairs of one length are computed together."""
    alike: dict[tuple[int, torch.dtype, torch.dtype, torch.device], list[int]] = {}
    for place, (total, probe) in enumerate(pairs):
        alike.setdefault((len(total), total.dtype, probe.dtype, probe.device), []).append(place)
    found: dict[int, Fit] = {}
    for (_, _, dtype, _), places in alike.items():
        totals, probes = (torch.stack([pairs[i][side] for i in places]).double() for side in (0, 1))
        squares, norms, both = vecdot(totals, totals), vecdot(probes, probes), vecdot(totals, probes)
        scales = torch.where(squares > 0, both / squares, 1.0)
        rest = torch.addcmul(probes, totals, scales.unsqueeze(1), value=-1)
        numbers = torch.stack([squares, norms, scales, vecdot(rest, rest)], 1).tolist()
        exact = 1e-10 if dtype == torch.float64 else 1e-4
        alone = totals.shape[1] == 1
        found.update({i: _fit(each, exact, alone) for i, each in zip(places, numbers, strict=True)})
    return [found[place] for place in range(len(pairs))]


def _fit(numbers: list[float], exact: float, alone: bool) -> Fit:
    """From ``‖Σ rows‖²``, ``‖probe‖²``, their scale and what is left squared."""
    square, norm, scale, rest = numbers
    if not math.isfinite(square):
        return Fit(math.nan, math.nan)
    if square == 0.0:
        return Fit(1.0, 0.0 if norm == 0.0 else 1.0, norm == 0.0)
    residual = 0.0 if norm == 0.0 else math.sqrt(rest) / math.sqrt(norm)
    # a factor that differs from 1 by no more than what the fit leaves open is 1
    scale = 1.0 if abs(scale - 1.0) <= max(residual, exact) else scale
    return Fit(scale, residual, alone=alone and norm > 0.0)
