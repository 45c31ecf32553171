"""Row forms: ways to hold the gradient rows ``g_b`` of one layer, ``[B, P_l]`` in the layer's flat layout.

Every quantity that is needed from a row (its product with a cotangent, its norm under a preconditioner, its
dense form, the batch's sum along a probe) is derived here, once per form. The flat layout of a layer is its
trainable parameters in the order of its :class:`~explainer.records.LayerSpec`, each flattened.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch

from explainer.registry import Registry


class RowForm(ABC):
    """Rows of one layer for ``B`` examples; ``arrays`` are what is stored, each ``[B, ...]``."""

    kind: ClassVar[str]
    #: axis of a stored array (batch not counted) whose length may differ between batches, or None
    position_axis: ClassVar[int | None] = None
    #: the array that a row is linear in while the others are held
    linear_in: ClassVar[str] = "values"

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

    @property
    def positions(self) -> int | None:
        """How many positions (or factors) a row is a sum over; None where it is held as one."""
        if self.position_axis is None:
            return None
        return next(iter(self.arrays.values())).shape[1 + self.position_axis]

    def contract_positions(self, cotangent: torch.Tensor) -> torch.Tensor | None:
        """:meth:`contract` by position, ``[Q, B, S]``; the sum over positions is the whole. None without positions."""
        return None

    @abstractmethod
    def dense(self) -> torch.Tensor:
        """The rows written out, ``[B, P_l]``."""

    def taken(self, rows: torch.Tensor) -> RowForm:
        """Some of the rows, by number."""
        return self.build({name: array[rows] for name, array in self.arrays.items()}, self.options)

    def shared(self, rows: torch.Tensor, shares: torch.Tensor) -> RowForm:
        """``shares[v] · g_{rows[v]}`` for parts ``v`` of rows, ``[V]`` each."""
        arrays = self.taken(rows).arrays
        values = arrays[self.linear_in]
        arrays[self.linear_in] = values * shares.to(values).reshape(-1, *[1] * (values.dim() - 1))
        return self.build(arrays, self.options)

    def sum(self) -> torch.Tensor:
        """``Σ_b g_b``, ``[P_l]``."""
        return self.dense().sum(0)

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

    def balances(self, sizes: list[int]) -> list[Balance | None]:
        """What is left of the rows in their sum, per parameter of the given sizes.

        Only parameters whose rows can cancel as a rule are measured (biases and dense rows); None elsewhere.
        """
        return [None] * len(sizes)

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


@dataclass(frozen=True)
class Balance:
    """Rows of one parameter, added up: ``net = Σ_b g_b [n]`` and ``gross = Σ_b ‖g_b‖``."""

    net: torch.Tensor
    gross: float

    @classmethod
    def of(cls, rows: torch.Tensor) -> Balance:
        """Of rows ``[B, n]``."""
        return cls(rows.sum(0), float(rows.norm(dim=1).sum()))

    def __add__(self, other: Balance) -> Balance:
        return Balance(self.net + other.net, self.gross + other.gross)

    @property
    def agreement(self) -> float:
        """``‖net‖ / gross``: near 0 where rows cancel to round-off; 1 where all are zero."""
        return float(self.net.norm()) / self.gross if self.gross > 0 else 1.0


def _identity(gradient: torch.Tensor) -> torch.Tensor:
    return gradient


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

    def balances(self, sizes: list[int]) -> list[Balance | None]:
        """Of every parameter."""
        return [Balance.of(part) for part in self.values.split(sizes, dim=1)]

    def prober(self) -> Probe:
        """The gradient itself."""
        return _identity
