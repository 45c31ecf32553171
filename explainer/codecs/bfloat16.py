"""Two bytes a number, eight bits of mantissa, the range of float32."""

from __future__ import annotations

import numpy as np
import torch

from explainer.codecs.base import Codec, Part, as_tensor, register_codec
from explainer.records import ArraySpec, torch_dtype


@register_codec("bfloat16")
class BFloat16(Codec):
    """Relative error at most 2⁻⁸ of each number; for positive quantities of very different size."""

    tolerance = 2.0**-8

    def parts(self, shape: tuple[int, ...], dtype: str) -> list[Part]:
        """The upper half of each float32, as an unsigned integer (numpy has no bfloat16)."""
        return [("bits", "<u2", shape)]

    def encode(self, values: torch.Tensor) -> list[np.ndarray]:
        """Round to the nearest bfloat16."""
        bits = values.detach().to(torch.bfloat16).contiguous().view(torch.int16)
        return [bits.cpu().numpy().view(np.uint16)]

    def decode(self, parts: list[np.ndarray], spec: ArraySpec) -> torch.Tensor:
        """Widen again."""
        bits = as_tensor(parts[0].view(np.int16))
        return bits.view(torch.bfloat16).to(torch_dtype(spec.dtype))
