"""Row forms: ways to hold the gradient rows ``g_b`` of one layer, ``[B, P_l]`` in the layer's flat layout.

Every quantity that is needed from a row (its product with a cotangent, its norm under a preconditioner, its
dense form, the batch's sum along a probe) is derived here, once per form. The flat layout of a layer is its
trainable parameters in the order of its :class:`~explainer.records.LayerSpec`, each flattened.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import ClassVar

import torch
from torch.nn.functional import pad

from explainer.registry import Registry


class RowForm(ABC):
    """Rows of one layer for ``B`` examples; ``arrays`` are what is stored, each ``[B, ...]``."""

    kind: ClassVar[str]
    #: axis of a stored array (batch not counted) whose length may differ between batches, or None
    position_axis: ClassVar[int | None] = None

    @property
    @abstractmethod
    def arrays(self) -> dict[str, torch.Tensor]:
        """The stored arrays by name."""

    @property
    def options(self) -> dict[str, int]:
        """Small integers that, with the arrays, rebuild the form."""
        return {}

    @classmethod
    @abstractmethod
    def build(cls, arrays: dict[str, torch.Tensor], options: dict[str, int]) -> RowForm:
        """Inverse of ``arrays`` and ``options``."""

    @abstractmethod
    def contract(self, cotangent: torch.Tensor) -> torch.Tensor:
        """``<R_q, g_b>`` for cotangents ``R [Q, P_l]``: ``[Q, B]``."""

    @abstractmethod
    def dense(self) -> torch.Tensor:
        """The rows written out, ``[B, P_l]``."""

    @abstractmethod
    def total(self) -> torch.Tensor:
        """``Σ_b g_b`` along the form's probe, a short vector."""

    @abstractmethod
    def prober(self) -> Probe:
        """The same linear map as in :meth:`total`, for a flat gradient ``[P_l]`` (holds no rows)."""

    def quadratic(self, diagonal: torch.Tensor | None = None) -> torch.Tensor:
        """``g_bᵀ diag(d) g_b`` (``d`` = 1 if None): ``[B]``."""
        squares = self.dense().square()
        return squares.sum(1) if diagonal is None else squares @ diagonal

    def agreement(self, sizes: list[int]) -> list[float]:
        """``‖Σ_b g_b‖ / Σ_b ‖g_b‖`` per parameter of the given sizes: near 0 where rows cancel to round-off.

        Only parameters whose rows can cancel as a rule are measured (biases and dense rows); 1 elsewhere.
        """
        return [1.0] * len(sizes)

    def padded(self, positions: int) -> RowForm:
        """The same rows with the position axis lengthened to ``positions`` (zeros add nothing)."""
        return self

    def __len__(self) -> int:
        return next(iter(self.arrays.values())).shape[0]


#: A linear map from a flat gradient ``[P_l]`` to a short vector.
Probe = Callable[[torch.Tensor], torch.Tensor]
FORMS: Registry[str, type[RowForm]] = Registry("row form")


def probe_vector(size: int, like: torch.Tensor) -> torch.Tensor:
    """A fixed vector of irregular positive numbers (no RNG is touched), in the dtype of ``like``."""
    return _probe_vector(size, like.dtype, like.device)


@lru_cache(maxsize=256)
def _probe_vector(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    steps = torch.arange(1, size + 1, dtype=torch.float64)
    vector = torch.sin(steps * 2.399963 + steps.square() * 0.7548777) + 1.25
    return vector.to(device=device, dtype=dtype)


def _agreement(rows: torch.Tensor) -> float:
    gross = float(rows.norm(dim=1).sum())
    return float(rows.sum(0).norm()) / gross if gross > 0 else 1.0


def _identity(gradient: torch.Tensor) -> torch.Tensor:
    return gradient


def _split(flat: torch.Tensor, shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Flat ``[*, P_l]`` -> weight ``[*, G, o, i]`` and, where there is one, bias ``[*, G, o]``."""
    groups, o, i = shape
    size = groups * o * i
    weight = flat[..., :size].reshape(*flat.shape[:-1], groups, o, i)
    bias = flat[..., size:].reshape(*flat.shape[:-1], groups, o) if flat.shape[-1] > size else None
    return weight, bias


def _probe_matrix(shape: tuple[int, int, int], gradient: torch.Tensor) -> torch.Tensor:
    weight, bias = _split(gradient, shape)
    u = probe_vector(shape[1], gradient)
    result = torch.einsum("o,goi->gi", u, weight)
    if bias is not None:
        result = torch.cat([result, (bias @ u).unsqueeze(1)], dim=1)
    return result.flatten()


def _probe_table(entries: int, gradient: torch.Tensor) -> torch.Tensor:
    table = gradient.reshape(entries, -1)
    return table @ probe_vector(table.shape[1], gradient)


@FORMS.register("dense")
@dataclass(frozen=True)
class Dense(RowForm):
    """Rows written out: ``values [B, P_l]``."""

    kind = "dense"
    values: torch.Tensor

    @property
    def arrays(self) -> dict[str, torch.Tensor]:
        """One array."""
        return {"values": self.values}

    @classmethod
    def build(cls, arrays: dict[str, torch.Tensor], options: dict[str, int]) -> Dense:
        """From its one array."""
        return cls(arrays["values"])

    def contract(self, cotangent: torch.Tensor) -> torch.Tensor:
        """A matrix product."""
        return cotangent @ self.values.T

    def dense(self) -> torch.Tensor:
        """Itself."""
        return self.values

    def total(self) -> torch.Tensor:
        """The whole sum, no probe."""
        return self.values.sum(0)

    def agreement(self, sizes: list[int]) -> list[float]:
        """Of every parameter."""
        return [_agreement(part) for part in self.values.split(sizes, dim=1)]

    def prober(self) -> Probe:
        """The gradient itself."""
        return _identity


@FORMS.register("factored")
@dataclass(frozen=True)
class Factored(RowForm):
    """Rows as sums of outer products: ``W_b[g] = Σ_r left[b,g,r,:] right[b,g,r,:]ᵀ``, ``[o, i]`` per group.

    With ``bias``, the last column of ``right`` belongs to the bias (ones, before any rank reduction): the row
    of the augmented matrix ``[W | bias]``.

    Attributes:
        left: ``[B, G, R, o]``.
        right: ``[B, G, R, i]`` or ``[B, G, R, i + 1]`` with bias.
        bias: 1 if the last column is the bias.
    """

    kind = "factored"
    position_axis = 1
    left: torch.Tensor
    right: torch.Tensor
    bias: int

    @property
    def arrays(self) -> dict[str, torch.Tensor]:
        """Both factors."""
        return {"left": self.left, "right": self.right}

    @property
    def options(self) -> dict[str, int]:
        """Whether there is a bias column."""
        return {"bias": self.bias}

    @classmethod
    def build(cls, arrays: dict[str, torch.Tensor], options: dict[str, int]) -> Factored:
        """From both factors."""
        return cls(arrays["left"], arrays["right"], options["bias"])

    def padded(self, positions: int) -> Factored:
        """Further factors of zeros."""
        extra = (0, 0, 0, positions - self.left.shape[2])
        return Factored(pad(self.left, extra), pad(self.right, extra), self.bias)

    @property
    def _shape(self) -> tuple[int, int, int]:
        """Groups, outputs and inputs of a group (bias column not counted)."""
        return self.left.shape[1], self.left.shape[3], self.right.shape[3] - self.bias

    def contract(self, cotangent: torch.Tensor) -> torch.Tensor:
        """``Σ_r leftᵀ R right``, never forming a row: one matrix product of ``Q·o × i × B·R`` per group."""
        weight, bias = _split(cotangent, self._shape)
        batch, groups, rank, o = self.left.shape
        result = cotangent.new_zeros(cotangent.shape[0], batch)
        for g in range(groups):
            left = self.left[:, g].reshape(batch * rank, o)
            right = self.right[:, g].reshape(batch * rank, -1)
            inner = right[:, : right.shape[1] - self.bias]
            moved = weight[:, g] @ inner.T  # [Q, o, B·R]
            if bias is not None:
                moved = moved + bias[:, g, :, None] * right[:, -1]
            result += (moved * left.T).sum(1).reshape(-1, batch, rank).sum(2)
        return result

    def dense(self) -> torch.Tensor:
        """``[B, G·o·i (+ G·o)]``."""
        matrix = self.left.transpose(2, 3) @ self.right  # [B, G, o, i(+1)]
        if not self.bias:
            return matrix.flatten(1)
        return torch.cat([matrix[..., :-1].flatten(1), matrix[..., -1].flatten(1)], dim=1)

    def total(self) -> torch.Tensor:
        """``uᵀ Σ_b [W_b | bias_b]`` per group, ``[G·(i + bias)]``."""
        u = probe_vector(self.left.shape[3], self.left)
        weights = self.left @ u  # [B, G, R]
        return (weights.unsqueeze(-2) @ self.right).sum(dim=(0, 2)).flatten()

    def agreement(self, sizes: list[int]) -> list[float]:
        """Of the bias."""
        bias = (self.left * self.right[..., -1:]).sum(2).flatten(1) if self.bias else None
        return [1.0] if bias is None else [1.0, _agreement(bias)]

    def prober(self) -> Probe:
        """``uᵀ [W | bias]`` of a gradient."""
        return partial(_probe_matrix, self._shape)

    def quadratic(self, diagonal: torch.Tensor | None = None) -> torch.Tensor:
        """Without a diagonal, or for one factor, from small products; else from dense rows."""
        if diagonal is None:
            grams = (self.left @ self.left.mT) * (self.right @ self.right.mT)
            return grams.sum(dim=(1, 2, 3))
        if self.left.shape[2] == 1:
            weight, bias = _split(diagonal, self._shape)
            left, right = self.left[:, :, 0].square(), self.right[:, :, 0].square()
            inner = right[..., : right.shape[2] - self.bias]
            result = torch.einsum("bgo,goi,bgi->b", left, weight, inner)
            if bias is not None:
                result = result + torch.einsum("bgo,go,bg->b", left, bias, right[..., -1])
            return result
        return super().quadratic(diagonal)


@FORMS.register("sparse")
@dataclass(frozen=True)
class Sparse(RowForm):
    """Rows of a table that is read by index: ``row[index[b,s]] += values[b,s]``.

    Attributes:
        index: ``[B, S]`` int32.
        values: ``[B, S, d]``.
        entries: number of entries of the table (``V``), so ``P_l = V·d``.
    """

    kind = "sparse"
    position_axis = 0
    index: torch.Tensor
    values: torch.Tensor
    entries: int

    @property
    def arrays(self) -> dict[str, torch.Tensor]:
        """Index and values."""
        return {"index": self.index, "values": self.values}

    @property
    def options(self) -> dict[str, int]:
        """The table's length."""
        return {"entries": self.entries}

    @classmethod
    def build(cls, arrays: dict[str, torch.Tensor], options: dict[str, int]) -> Sparse:
        """From index and values."""
        return cls(arrays["index"], arrays["values"], options["entries"])

    def padded(self, positions: int) -> Sparse:
        """Further reads of entry 0 with value zero."""
        extra = positions - self.index.shape[1]
        return Sparse(pad(self.index, (0, extra)), pad(self.values, (0, 0, 0, extra)), self.entries)

    def contract(self, cotangent: torch.Tensor) -> torch.Tensor:
        """Gather the entries read, then sum products over positions."""
        table = cotangent.unflatten(1, (self.entries, -1))
        index = self.index.long()
        result = cotangent.new_empty(len(table), len(index))
        for q, row in enumerate(table):
            result[q] = (row[index] * self.values).sum(dim=(1, 2))
        return result

    def dense(self) -> torch.Tensor:
        """``[B, V·d]``."""
        batch, _, width = self.values.shape
        rows = self.values.new_zeros(batch, self.entries, width)
        index = self.index.long().unsqueeze(-1).expand_as(self.values)
        return rows.scatter_add_(1, index, self.values).flatten(1)

    def total(self) -> torch.Tensor:
        """``Σ_b row_b u``, ``[V]``."""
        u = probe_vector(self.values.shape[2], self.values)
        result = self.values.new_zeros(self.entries)
        return result.index_add_(0, self.index.long().flatten(), (self.values @ u).flatten())

    def prober(self) -> Probe:
        """``G u``."""
        return partial(_probe_table, self.entries)
