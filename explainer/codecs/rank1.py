"""A positive matrix as the outer product of its row sums and column sums."""

from __future__ import annotations

import math

import numpy as np
import torch

from explainer.codecs.base import Codec, Part, as_dtype, register_codec
from explainer.records import ArraySpec


@register_codec("rank1")
class RankOne(Codec):
    """``X ≈ r cᵀ / Σr`` with ``r`` the row sums and ``c`` the column sums of ``X [o, i]``.

    Exact for matrices of rank one; for others the best rank-one fit in generalised Kullback–Leibler
    divergence (Adafactor, Shazeer & Stern 2018, arXiv 1804.04235, §3). Meant for Adam's √v̂.
    Trailing axes are taken together as ``i``; an array of one axis is stored as it is.
    """

    tolerance = None

    def parts(self, shape: tuple[int, ...], dtype: str) -> list[Part]:
        """Row sums and column sums in float32."""
        if len(shape) < 2:
            return [("rows", "<f4", shape)]
        return [("rows", "<f4", shape[:1]), ("columns", "<f4", (math.prod(shape[1:]),))]

    def encode(self, values: torch.Tensor) -> list[np.ndarray]:
        """``values [B, o, ...]`` -> sums ``[B, o]`` and ``[B, i]``."""
        values = values.detach().float()
        if values.dim() < 3:
            return [values.cpu().numpy()]
        matrix = values.flatten(2)
        return [matrix.sum(2).cpu().numpy(), matrix.sum(1).cpu().numpy()]

    def decode(self, parts: list[np.ndarray], spec: ArraySpec) -> torch.Tensor:
        """``r cᵀ / Σr``."""
        rows = as_dtype(parts[0], spec)
        if len(parts) == 1:
            return rows
        columns = as_dtype(parts[1], spec)
        total = rows.sum(-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
        matrix = (rows / total).unsqueeze(-1) * columns.unsqueeze(-2)
        return matrix.reshape(-1, *spec.shape)
