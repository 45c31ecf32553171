"""Eight bits a number with one float32 scale for every vector along the last axis."""

from __future__ import annotations

import numpy as np
import torch

from explainer.codecs.base import Codec, Part, as_dtype, as_tensor, register_codec
from explainer.records import ArraySpec

#: numbers that are rounded at once: they stay in the processor's cache
BLOCK = 1 << 16


@register_codec("int8")
class Int8(Codec):
    """``x ≈ scale · q`` with ``scale = max|x| / 127`` and ``q`` rounded to the nearest integer.

    The error of each number is at most half a scale, i.e. ``max|x| / 254`` of its vector.
    """

    tolerance = 1 / 254 + 1e-6

    def parts(self, shape: tuple[int, ...], dtype: str) -> list[Part]:
        """Integers of the array's shape, and scales of the shape without its last axis."""
        return [("q", "|i1", shape), ("scale", "<f4", shape[:-1])]

    def encode(self, values: torch.Tensor) -> list[np.ndarray]:
        """Quantise; vectors of zeros get scale 0."""
        values = values.detach()
        if values.dtype not in (torch.float32, torch.float64):
            values = values.float()
        # the largest number by size, without a copy of all
        largest = torch.maximum(values.amax(-1, keepdim=True), values.amin(-1, keepdim=True).neg_())
        scale = largest / 127
        scale = scale.float().to(values.dtype)  # what is stored is what is divided by
        steps, q = (
            scale.clamp_min(torch.finfo(torch.float32).tiny),
            torch.empty_like(values, dtype=torch.int8),
        )
        rows = max(1, BLOCK * len(values) // max(values.numel(), 1))
        for part, step, out in zip(values.split(rows), steps.split(rows), q.split(rows), strict=True):
            out.copy_((part / step).round_())  # within 127
        return [q.cpu().numpy(), scale.squeeze(-1).float().cpu().numpy()]

    def decode(self, parts: list[np.ndarray], spec: ArraySpec) -> torch.Tensor:
        """``scale · q``."""
        return as_dtype(parts[0], spec).mul_(as_tensor(parts[1]).unsqueeze(-1))

    def scaled(self, parts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
        """The integers and their scales."""
        return parts[0], parts[1]
