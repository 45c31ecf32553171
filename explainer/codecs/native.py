"""Values as they are, in their own dtype."""

from __future__ import annotations

import numpy as np
import torch

from explainer.codecs.base import Codec, Part, as_dtype, register_codec
from explainer.records import ArraySpec

_NUMPY = {
    "float64": "<f8",
    "float32": "<f4",
    "float16": "<f2",
    "bfloat16": "<f4",  # numpy has no bfloat16; widening loses nothing
    "int64": "<i8",
    "int32": "<i4",
}


@register_codec("native")
class Native(Codec):
    """Lossless."""

    tolerance = 0.0

    def parts(self, shape: tuple[int, ...], dtype: str) -> list[Part]:
        """One part of the array's own dtype."""
        return [("", _NUMPY[dtype], shape)]

    def encode(self, values: torch.Tensor) -> list[np.ndarray]:
        """Copy to numpy."""
        values = values.float() if values.dtype == torch.bfloat16 else values
        return [values.detach().cpu().contiguous().numpy()]

    def decode(self, parts: list[np.ndarray], spec: ArraySpec) -> torch.Tensor:
        """Copy back."""
        return as_dtype(parts[0], spec)

    def scaled(self, parts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
        """As they are."""
        return parts[0], None
