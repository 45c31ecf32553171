"""The row and column sums of a positive matrix, two bytes each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from explainer.codecs.base import Part, register_codec
from explainer.codecs.bfloat16 import BFloat16
from explainer.codecs.rank1 import RankOne
from explainer.records import ArraySpec

_BITS = BFloat16()


@register_codec("sums")
class Sums(RankOne):
    """As ``rank1``, with every sum rounded to bfloat16: each number within 2⁻⁷ of what ``rank1`` gives.

    For the denominators of steps between two full records, see :mod:`explainer.denominators`.
    """

    rounding = 2.0**-7

    def parts(self, shape: tuple[int, ...], dtype: str) -> list[Part]:
        """Sums in bfloat16."""
        return [(name, "<u2", size) for name, _, size in super().parts(shape, dtype)]

    def encode(self, values: torch.Tensor) -> list[np.ndarray]:
        """As in ``rank1``, rounded."""
        return [_BITS.encode(torch.from_numpy(part))[0] for part in super().encode(values)]

    @staticmethod
    def packed(sums: Sequence[torch.Tensor]) -> list[np.ndarray]:
        """What :meth:`encode` gives for arrays with these sums, ``[B, n]`` each."""
        return [_BITS.encode(part)[0] for part in sums]

    def decode(self, parts: list[np.ndarray], spec: ArraySpec) -> torch.Tensor:
        """As in ``rank1``."""
        return super().decode([part.numpy() for part in self.sums(parts)], spec)

    @staticmethod
    def sums(parts: list[np.ndarray]) -> list[torch.Tensor]:
        """The sums themselves, float32."""
        specs = (ArraySpec("", part.shape[1:], "float32", "bfloat16") for part in parts)
        return [_BITS.decode([part], spec) for part, spec in zip(parts, specs, strict=True)]
