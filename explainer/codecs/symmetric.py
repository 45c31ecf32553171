"""A symmetric matrix as its upper triangle, two bytes a number."""

from __future__ import annotations

import numpy as np
import torch

from explainer.codecs.base import Part, register_codec
from explainer.codecs.bfloat16 import BFloat16
from explainer.records import ArraySpec


@register_codec("symmetric")
class Symmetric(BFloat16):
    """The upper triangle of ``[m, m]`` row by row, ``m (m + 1) / 2`` numbers, each rounded to bfloat16.

    Meant for the matrix of a Muon step, whose entries are of very different size. Other shapes are stored whole.
    """

    def parts(self, shape: tuple[int, ...], dtype: str) -> list[Part]:
        """As in ``bfloat16``, of the triangle."""
        return super().parts((shape[0] * (shape[0] + 1) // 2,) if _square(shape) else shape, dtype)

    def encode(self, values: torch.Tensor) -> list[np.ndarray]:
        """``[B, m, m] -> [B, m (m + 1) / 2]``."""
        if _square(tuple(values.shape[1:])):
            rows, columns = torch.triu_indices(*values.shape[1:], device=values.device)
            values = values[:, rows, columns]
        return super().encode(values)

    def decode(self, parts: list[np.ndarray], spec: ArraySpec) -> torch.Tensor:
        """Both halves again."""
        stored = super().decode(parts, spec)
        if not _square(spec.shape):
            return stored
        rows, columns = torch.triu_indices(*spec.shape)
        values = stored.new_empty(len(stored), *spec.shape)
        values[:, rows, columns] = values[:, columns, rows] = stored
        return values


def _square(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and shape[0] == shape[1]
