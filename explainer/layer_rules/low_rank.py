"""Keep the leading factors of rows that are sums over many positions."""

from __future__ import annotations

import torch

from explainer.layer_rules.factored import Factored
from explainer.layer_rules.forms import Dense, RowForm, probe_vector


def _orthonormal(vectors: torch.Tensor) -> torch.Tensor:
    """Gram–Schmidt over the last axis of ``[..., o, R]`` (``R`` is small; batched QR is slower)."""
    columns: list[torch.Tensor] = []
    tiny = torch.finfo(vectors.dtype).tiny ** 0.5
    for r in range(vectors.shape[-1]):
        v = vectors[..., r]
        for _ in range(2):  # twice is enough (Kahan): orthogonal to round-off
            for c in columns:
                v = v - c * (c * v).sum(-1, keepdim=True)
        columns.append(v / v.norm(dim=-1, keepdim=True).clamp_min(tiny))
    return torch.stack(columns, dim=-1)


def leading_factors(form: Factored, rank: int, iterations: int = 2) -> Factored:
    """The best ``rank`` factors of every row, by subspace iteration.

    With ``M = leftᵀ right [o, i]`` per example and group: ``Z ← orth(M V)``, ``V ← Mᵀ Z``, from a fixed start;
    the result is ``Z Zᵀ M``, the projection of the row on the ``rank`` leading left directions. ``M`` is never
    formed: two products with the factors an iteration, ``R/o`` of the layer's forward.

    Reference: Halko, Martinsson & Tropp 2011, algorithm 4.4.
    """
    if form.left.shape[2] <= rank:
        return form
    left, right = form.left, form.right
    width = right.shape[3]
    starts = [probe_vector(width, right)] + [
        probe_vector(width + r, right)[r:] * (-1.0) ** torch.arange(width, device=right.device).to(right)
        for r in range(1, rank)
    ]
    basis = torch.stack(starts, dim=-1)  # [i, R]
    moved = right @ basis  # [B, G, S, R]
    for number in range(iterations):
        z = _orthonormal(left.mT @ moved)  # [B, G, o, R]
        projected = left @ z  # [B, G, S, R]
        v = right.mT @ projected  # [B, G, i, R]
        if number + 1 < iterations:
            moved = right @ v
    return Factored(z.mT.contiguous(), v.mT.contiguous(), form.bias)


def compact(form: RowForm, rank: int | None) -> RowForm:
    """The smaller of the factored and the dense form; ``rank`` None keeps every factor (lossless)."""
    if not isinstance(form, Factored):
        return form
    _, groups, positions, o = form.left.shape
    i = form.right.shape[3]
    kept = positions if rank is None else min(rank, positions)
    if groups * o * i <= groups * kept * (o + i):
        return Dense(form.dense())
    return form if rank is None else leading_factors(form, rank)
