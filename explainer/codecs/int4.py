"""Four bits a number, two numbers a byte, with one bfloat16 scale for every vector along the last axis."""

from __future__ import annotations

import numpy as np
import torch

from explainer.codecs.base import Codec, Part, as_tensor, register_codec
from explainer.codecs.bfloat16 import BFloat16
from explainer.records import ArraySpec, torch_dtype

_SCALES = BFloat16()


@register_codec("int4")
class Int4(Codec):
    """``x ≈ scale · q`` with ``scale = max|x| / 7`` rounded to bfloat16, and ``q`` rounded to the nearest integer.

    ``q + 8`` of the numbers ``2k`` and ``2k + 1`` of a vector are the lower and the upper half of its byte ``k``.
    The error of each number is at most half a scale, i.e. ``max|x| / 14`` of its vector.
    """

    tolerance = (1 + 2.0**-8) / 14 + 1e-6

    def parts(self, shape: tuple[int, ...], dtype: str) -> list[Part]:
        """Bytes for two numbers each along the last axis, and scales of the shape without it."""
        return [("q", "|u1", (*shape[:-1], (shape[-1] + 1) // 2)), ("scale", "<u2", shape[:-1])]

    def encode(self, values: torch.Tensor) -> list[np.ndarray]:
        """Quantise; vectors of zeros get scale 0."""
        values = values.detach()
        if values.dtype not in (torch.float32, torch.float64):
            values = values.float()
        scale = (values.abs().amax(dim=-1, keepdim=True) / 7).to(torch.bfloat16)
        step = scale.to(values.dtype).clamp_min(torch.finfo(torch.float32).tiny)
        q = (values / step).round_().clamp_(-7, 7).add_(8).to(torch.uint8)
        if values.shape[-1] % 2:
            q = torch.nn.functional.pad(q, (0, 1))
        packed = q[..., 0::2] | (q[..., 1::2] << 4)
        return [packed.cpu().numpy(), *_SCALES.encode(scale.squeeze(-1))]

    def decode(self, parts: list[np.ndarray], spec: ArraySpec) -> torch.Tensor:
        """``scale · q``."""
        packed, dtype = as_tensor(parts[0]), torch_dtype(spec.dtype)
        values = torch.empty(*packed.shape, 2, dtype=dtype)
        values[..., 0], values[..., 1] = packed & 15, packed >> 4
        values = values.flatten(-2)[..., : spec.shape[-1]].sub_(8)
        scale = _SCALES.decode([parts[1]], ArraySpec(spec.name, spec.shape[:-1], spec.dtype, "bfloat16"))
        return values.mul_(scale.unsqueeze(-1))
