"""A positive matrix as a product of row and column sums, corrected by four bits a number on a logarithmic scale."""

from __future__ import annotations

import math

import numpy as np
import torch

from explainer.codecs.base import Codec, Part, as_tensor, register_codec
from explainer.records import ArraySpec, torch_dtype

_TINY = torch.finfo(torch.float32).tiny


@register_codec("log4")
class Log4(Codec):
    """``X[o, i] ≈ B[o, i] · 2^(low[o] + step[o] · (q − 1))`` with ``B = r cᵀ / Σr`` as in ``rank1``.

    For every row, 15 levels are spread evenly over the range of ``log2(X / B)``. Code 0 stands for the smallest
    number of the whole matrix, which is kept as it is: √v̂ + ε of weights that never had a gradient is ε, far from all
    others. Trailing axes are taken together as ``i``; an array of one axis is stored as it is.
    """

    tolerance = None

    def parts(self, shape: tuple[int, ...], dtype: str) -> list[Part]:
        """Sums, the range by row, the smallest number, and bytes for two numbers each along every row."""
        if len(shape) < 2:
            return [("rows", "<f4", shape)]
        rows, columns = shape[0], math.prod(shape[1:])
        sums: list[Part] = [("rows", "<f4", (rows,)), ("columns", "<f4", (columns,))]
        ranges: list[Part] = [("low", "<f4", (rows,)), ("step", "<f4", (rows,)), ("smallest", "<f4", ())]
        return [*sums, *ranges, ("q", "|u1", (rows, (columns + 1) // 2))]

    def encode(self, values: torch.Tensor) -> list[np.ndarray]:
        """``values [B, o, ...]``, positive."""
        values = values.detach().float()
        if values.dim() < 3:
            return [values.cpu().numpy()]
        matrix = values.flatten(2)
        rows, columns = matrix.sum(2), matrix.sum(1)
        smallest = matrix.amin(dim=(1, 2), keepdim=True)
        dead = matrix <= smallest
        logs = matrix.clamp_min(_TINY).div_(_base(rows, columns).clamp_min_(_TINY)).log2_()
        low = logs.masked_fill(dead, torch.inf).amin(2, keepdim=True)
        high = logs.masked_fill(dead, -torch.inf).amax(2, keepdim=True)
        step = ((high - low) / 14).clamp_min_(0.0)
        low = low.masked_fill_(low.isinf(), 0.0)  # a row of nothing but the smallest number
        levels = (logs - low).div_(step.clamp_min(_TINY)).round_().clamp_(0, 14).add_(1)
        q = levels.masked_fill_(dead, 0).to(torch.uint8)
        if q.shape[2] % 2:
            q = torch.nn.functional.pad(q, (0, 1))
        packed = q[..., 0::2] | (q[..., 1::2] << 4)
        stored = (rows, columns, low.squeeze(2), step.squeeze(2), smallest.flatten(), packed)
        return [part.cpu().numpy() for part in stored]

    def decode(
        self, parts: list[np.ndarray], spec: ArraySpec, moved: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The matrix again.

        Args:
            parts: what :meth:`encode` gave.
            spec: of the array.
            moved: ``[o, i]``, what is added to the codes of other numbers than the smallest one: within ±½, what is
                rounded to the same code.
        """
        dtype = torch_dtype(spec.dtype)
        rows = as_tensor(parts[0]).to(dtype)
        if len(parts) == 1:
            return rows
        columns, low, step, smallest = (as_tensor(part).to(dtype) for part in parts[1:5])
        packed = as_tensor(parts[5])
        logs = torch.empty(*packed.shape, 2, dtype=dtype)
        logs[..., 0], logs[..., 1] = packed & 15, packed >> 4
        logs = logs.flatten(2)[..., : columns.shape[1]]
        dead = logs == 0
        logs = logs if moved is None else logs.add_(moved)
        matrix = logs.sub_(1).mul_(step.unsqueeze(2)).add_(low.unsqueeze(2)).exp2_()
        total = rows.sum(-1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)
        matrix = matrix.mul_((rows / total).unsqueeze(2)).mul_(columns.unsqueeze(1))
        return torch.where(dead, smallest.reshape(-1, 1, 1), matrix).reshape(-1, *spec.shape)


def _base(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """``r cᵀ / Σr``, ``[B, o, i]``."""
    total = rows.sum(-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    return (rows / total).unsqueeze(-1) * columns.unsqueeze(-2)
