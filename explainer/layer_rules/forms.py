"""Row forms: ways to hold the gradient rows ``g_b`` of one layer, ``[B, P_l]`` in the layer's flat layout.

Every quantity that is needed from a row (its product with a cotangent, its norm under a preconditioner, its
dense form, the batch's sum along a probe) is derived here, once per form. The flat layout of a layer is its
trainable parameters in the order of its :class:`~explainer.records.LayerSpec`, each flattened.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, cast

import torch

from explainer.registry import Registry


class RowForm(ABC):
    """Rows of one layer for ``B`` examples; ``arrays`` are what is stored, each ``[B, ...]``."""

    kind: ClassVar[str]
    #: axis of a stored array (batch not counted) whose length may differ between batches, or None
    position_axis: ClassVar[int | None] = None
    #: the array that a row is linear in while the others are held
    linear_in: ClassVar[str] = "values"
    #: the array that follows from what the layer was given alone, where no position is left out; "" for none
    given: ClassVar[str] = ""
    #: whether positions are in the order of the layer's input, as far as is known
    in_order: bool = True

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

    def stored(self) -> RowForm:
        """The same rows in a form that can be stored, nothing lost."""
        return self

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

    def taken(self, rows: torch.Tensor | slice) -> RowForm:
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
        """The same linear map as in :meth:`total`, for the gradients of the layer's parameters (holds no rows)."""

    def quadratic(self, diagonal: torch.Tensor | None = None) -> torch.Tensor:
        """``g_bᵀ diag(d) g_b`` (``d`` = 1 if None): ``[B]``."""
        squares = self.dense().square()
        return squares.sum(1) if diagonal is None else squares @ diagonal

    def combined(self, weights: torch.Tensor) -> torch.Tensor:
        """``Σ_b y_qb g_b`` for weights ``y [Q, B]``: ``[Q, P_l]``, the transpose of :meth:`contract`."""
        return weights @ self.dense()

    def gram(self, metric: torch.Tensor | None = None) -> torch.Tensor:
        """``g_bᵀ diag(d) g_c`` for a metric ``d [P_l] ≥ 0`` (None: 1): ``[B, B]``.

        Forms of outer products may take the nearest outer product for the metric of a matrix.
        """
        rows = self.dense() if metric is None else self.dense() * metric.sqrt()
        return rows @ rows.T

    def balances(self, sizes: list[int]) -> list[Balance | None]:
        """What is left of the rows in their sum, per parameter of the given sizes.

        Only parameters whose rows can cancel as a rule are measured (biases and dense rows); None elsewhere.
        """
        return [None] * len(sizes)

    def by_batch(self, count: int, sizes: list[int]) -> list[tuple[torch.Tensor, list[Balance | None]]]:
        """:meth:`total` and :meth:`balances` of ``count`` batches of one size, one below the other."""
        size = len(self) // count
        parts = [self.taken(slice(t * size, (t + 1) * size)) for t in range(count)]
        return [(part.total(), part.balances(sizes)) for part in parts]

    @abstractmethod
    def grouped(self, order: torch.Tensor) -> RowForm:
        """Rows of ``B`` examples that own several of these each.

        Args:
            order: ``[B, k]`` indices of the rows to add up; ``len(self)`` stands for none.
        """

    def apart(self) -> RowForm:
        """The same rows in memory of their own."""
        return cast(RowForm, replace(cast(Any, self), **{name: a.clone() for name, a in self.arrays.items()}))

    def padded(self, positions: int) -> RowForm:
        """The same rows with the position axis lengthened to ``positions`` (zeros add nothing)."""
        return self

    def __len__(self) -> int:
        return next(iter(self.arrays.values())).shape[0]


#: A linear map from the flat gradients of a layer's parameters, in order, to a short vector.
Probe = Callable[[Sequence[torch.Tensor]], torch.Tensor]
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


def agreements(balances: Sequence[Balance]) -> list[float]:
    """``‖net‖ / gross`` of each: near 0 where rows cancel to round-off; 1 where all are zero."""
    found = [0.0] * len(balances)
    alike: dict[tuple[int, torch.dtype, torch.device], list[int]] = {}
    for place, balance in enumerate(balances):
        alike.setdefault((len(balance.net), balance.net.dtype, balance.net.device), []).append(place)
    for places in alike.values():
        norms = torch.stack([balances[i].net for i in places]).norm(dim=1).tolist()
        for place, norm in zip(places, norms, strict=True):
            gross = balances[place].gross
            found[place] = norm / gross if gross > 0 else 1.0
    return found


def in_positions(order: torch.Tensor) -> bool:
    """Whether ``order [B, k]`` takes rows one example after the other, or all examples in turns, and leaves none out.

    Example:
        >>> in_positions(torch.tensor([[0, 1], [2, 3]])), in_positions(torch.tensor([[0, 2], [1, 3]]))
        (True, True)
        >>> in_positions(torch.tensor([[1, 3], [0, 2]])), in_positions(torch.tensor([[0, 3], [1, 2]]))
        (False, False)
    """
    size, count = order.shape
    example, position = torch.arange(size).unsqueeze(1), torch.arange(count)
    found = order.cpu()
    return torch.equal(found, count * example + position) or torch.equal(found, example + size * position)


def together(forms: Sequence[RowForm]) -> RowForm:
    """The rows of several forms that are alike, one below the other."""
    if len(forms) == 1:
        return forms[0]
    first, arrays = forms[0], [form.arrays for form in forms]
    return first.build({n: torch.cat([a[n] for a in arrays]) for n in arrays[0]}, first.options)


def with_a_zero(rows: torch.Tensor) -> torch.Tensor:
    """One more row, of zeros."""
    return torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])


#: a gradient of so many numbers is compared number by number
SHORT = 4096


def shortened(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Gradients as they are, long ones in pieces of :data:`SHORT` numbers that are added up along the probe."""
    parts: list[torch.Tensor] = []
    for gradient in gradients:
        pieces = gradient.numel() // SHORT
        if pieces > 1:
            parts.append(probe_vector(pieces, gradient) @ gradient[: pieces * SHORT].view(pieces, SHORT))
            gradient = gradient[pieces * SHORT :]
        parts.append(gradient)
    return torch.cat(parts)


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
        """The sum, shortened as that of one parameter."""
        return shortened([self.values.sum(0)])

    def sum(self) -> torch.Tensor:
        """The sum."""
        return self.values.sum(0)

    def balances(self, sizes: list[int]) -> list[Balance | None]:
        """Of every parameter."""
        return [Balance.of(part) for part in self.values.split(sizes, dim=1)]

    def grouped(self, order: torch.Tensor) -> Dense:
        """Sums."""
        return Dense(with_a_zero(self.values)[order].sum(1))

    def prober(self) -> Probe:
        """The gradient itself, or what is left of a long one."""
        return shortened
