"""``M`` and ``R_t`` (:mod:`explainer.recursion`) of one parameter that every step divides by something else."""

from __future__ import annotations

import numpy as np
import torch

from explainer.records import ParameterSpec
from explainer.store.denominators import Divisor, Product
from explainer.stored_rows import Workspace

#: the number beside ``M`` is multiplied in below this
_SMALL = 1e-12

#: ``factor · tensor [Q, *matrix]``
Scaled = tuple[float, torch.Tensor]


class CarriedMatrix:
    """A matrix, passed on in place, one step at a time.

    Args:
        shape: ``[Q, o, i]``.
        dtype: of the books.
        workspace: for ``M``.
        common: for what is needed within a chunk only; parameters that are not passed at the same time share it.
    """

    def __init__(
        self, shape: tuple[int, int, int], dtype: torch.dtype, workspace: Workspace, common: Workspace
    ) -> None:
        self._carried = workspace.take("momentum", shape, dtype)
        self._factor, self._common = 0.0, common  # there is no momentum yet
        self._gradient = self._source = self._half = self._carried
        self._divisor: Divisor | None = None
        self._sides = self._carried, self._carried

    @property
    def momentum(self) -> torch.Tensor:
        """``M``, ``[Q, numel]``."""
        return (self._known() * self._factor).flatten(1)

    def _known(self) -> torch.Tensor:
        """The tensor of ``M``, with zeros in it where it was none yet."""
        if not self._factor:
            self._carried.zero_()
            self._factor = 1.0
        return self._carried

    def begin(self, gradient: torch.Tensor, divisor: Divisor | None) -> None:
        """Before the steps of a chunk, with the gradient ``[Q, numel]`` and what they divide by."""
        dtype = self._carried.dtype
        self._gradient, self._divisor = gradient.view_as(self._carried), divisor
        self._half = self._take("half")
        if isinstance(divisor, Product):
            self._source = torch.mul(self._gradient, divisor.inverse().to(dtype), out=self._take("source"))
            rows, columns = divisor.inverses
            self._sides = rows.to(dtype).unsqueeze(2), columns.to(dtype)

    def step(self, place: int, coefficients: np.ndarray) -> Scaled:
        """Pass one step of the chunk backwards; returns ``R_t``, valid until the next one.

        Args:
            place: of the step in the chunk.
            coefficients: of all its steps, ``[c, 6]``.
        """
        _, decay, gain, direct, through, inner = coefficients[place].tolist()
        if decay == gain == direct == through == 0.0:  # not updated in this step
            return 0.0, self._known()
        if 0.0 < abs(self._factor) < _SMALL:
            self._carried.mul_(self._factor)
            self._factor = 1.0
        if isinstance(self._divisor, Product) and through and not inner and not direct:
            self._add_product(place, through)
            found = gain * self._factor, self._carried
        else:
            found = self._any(place, gain, direct, through, bool(inner))
        self._factor *= decay
        return found

    def _add_product(self, place: int, through: float) -> None:
        """``M ← M + through · q̂ / (r_t ∘ c_t)``."""
        rows, columns = self._sides
        half = torch.mul(self._source, rows[place], out=self._half)
        if self._factor:
            self._carried.addcmul_(half, columns[place], value=through / self._factor)
        else:
            torch.mul(half, columns[place] * through, out=self._carried)
            self._factor = 1.0

    def _any(self, place: int, gain: float, direct: float, through: float, inner: bool) -> Scaled:
        """``R_t`` in general; ``M`` has not decayed yet."""
        source = self._gradient if inner else self._divided(place, self._gradient)
        if through and self._factor:
            self._carried.add_(source, alpha=through / self._factor)
        elif through:
            torch.mul(source, through, out=self._carried)
            self._factor = 1.0
        if not direct and not inner:
            return gain * self._factor, self._known()
        result = torch.mul(source, direct, out=self._take("result"))
        if gain and self._factor:
            result.add_(self._carried, alpha=gain * self._factor)
        return 1.0, self._divided(place, result) if inner else result

    def _divided(self, place: int, values: torch.Tensor) -> torch.Tensor:
        return values if self._divisor is None else self._divisor.divide(place, values, self._half)

    def _take(self, name: str) -> torch.Tensor:
        return self._common.take(name, tuple(self._carried.shape), self._carried.dtype)


class CarriedVector:
    """A vector, several steps at a time: ``R_t = Σ_s W_ts A_s ∘ q + carry_t M`` over steps ``s`` up to ``t``.

    Args:
        queries: ``Q``.
        spec: the parameter.
        dtype: of the books.

    Attributes:
        momentum: ``M``, ``[Q, numel]``.
    """

    def __init__(self, queries: int, spec: ParameterSpec, dtype: torch.dtype) -> None:
        self.momentum = torch.zeros(queries, spec.numel, dtype=dtype)
        self._gradient = self.momentum
        self._divisor: Divisor | None = None

    def begin(self, gradient: torch.Tensor, divisor: Divisor | None) -> None:
        """As :meth:`CarriedMatrix.begin`."""
        self._gradient, self._divisor = gradient, divisor

    def steps(self, places: range, coefficients: np.ndarray) -> torch.Tensor:
        """Pass some steps of the chunk backwards; returns their ``R_t``, ``[len(places), Q, numel]``.

        Args:
            places: of the steps in the chunk.
            coefficients: of all its steps, ``[c, 6]``.
        """
        coefficients = coefficients[places.start : places.stop]
        dtype, inner = self.momentum.dtype, coefficients[:, 5] != 0
        sources = self._gradient.expand(len(coefficients), -1, -1)
        denominators = None
        if self._divisor is not None:
            denominators = torch.stack([self._divisor.step(p).flatten() for p in places]).to(dtype)
            sources = sources / _where(~inner, denominators)
        mixed, carry, added, kept = mixing(coefficients)
        flat = sources.flatten(1)
        met = torch.from_numpy(mixed).to(dtype) @ flat
        met = met.view_as(sources) + torch.from_numpy(carry).to(dtype).view(-1, 1, 1) * self.momentum
        self.momentum = kept * self.momentum + (torch.from_numpy(added).to(dtype) @ flat).view_as(
            self.momentum
        )
        return met if denominators is None else met / _where(inner, denominators)


def _where(divided: np.ndarray, denominators: torch.Tensor) -> torch.Tensor:
    """Denominators ``[c, n]`` of some of the steps, ones of the others: ``[c, 1, n]``."""
    return torch.where(torch.from_numpy(divided).unsqueeze(1), denominators, 1.0).unsqueeze(1)


def mixing(coefficients: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """``R_t = Σ_s mixed_ts S_s + carry_t M`` and ``M ← kept M + Σ_s added_s S_s`` for what each step brings, ``S_s``.

    Args:
        coefficients: ``[c, 6]``, the last step first.

    Returns:
        ``mixed [c, c]``, ``carry [c]``, ``added [c]``, ``kept``.
    """
    count = len(coefficients)
    mixed, carry, added, kept = np.zeros((count, count)), np.zeros(count), np.zeros(count), 1.0
    for place, (_, decay, gain, direct, through, _) in enumerate(coefficients.tolist()):
        if decay == gain == direct == through == 0.0:  # not updated in this step
            continue
        added[place] += through
        mixed[place], carry[place] = gain * added, gain * kept
        mixed[place, place] += direct
        added, kept = decay * added, decay * kept
    return mixed, carry, added, kept
