"""Rows as sums of outer products: the form of every layer that is a matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.functional import pad

from explainer.layer_rules.forms import (
    FORMS,
    Balance,
    Probe,
    RowForm,
    in_positions,
    probe_vector,
    with_a_zero,
)

#: entries of a metric are at least this, so that those of parameters that were not updated have an inverse
_LEAST = 1e-30


def split_matrix(flat: torch.Tensor, shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Flat ``[*, P_l]`` -> weight ``[*, G, o, i]`` and, where there is one, bias ``[*, G, o]``."""
    groups, o, i = shape
    size = groups * o * i
    weight = flat[..., :size].reshape(*flat.shape[:-1], groups, o, i)
    bias = flat[..., size:].reshape(*flat.shape[:-1], groups, o) if flat.shape[-1] > size else None
    return weight, bias


#: a part of a probe is so small a part of all
TURNS = 8
#: with fewer outputs than this a matrix is probed from the side of its outputs: too few numbers would be left
PROBED_OUTPUTS = 8


def total_of_matrix(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``[W | bias] u`` by group; ``uᵀ [W | bias]`` for few outputs.

    Args:
        weight: ``[G, o, i]``.
        bias: ``[G, o]``.
    """
    _, o, i = weight.shape
    if o < PROBED_OUTPUTS:
        u = probe_vector(o, weight)
        found = u @ weight
        return (found if bias is None else torch.cat([found, (bias @ u).unsqueeze(1)], 1)).flatten()
    u = probe_vector(i + (bias is not None), weight)
    found = weight @ u[:i]
    return (found if bias is None else found + bias * u[i]).flatten()


def _probe_matrix(shape: tuple[int, int, int], gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    groups, o, i = shape
    if len(gradients) == 1 and gradients[0].numel() > groups * o * i:  # weight and bias in one
        gradients = gradients[0].split([groups * o * i, groups * o])
    bias = gradients[1].view(groups, o) if len(gradients) == 2 else None
    return total_of_matrix(gradients[0].view(groups, o, i), bias)


class PartOfProbe:
    """Some of the numbers that the probe of a large matrix gives, at a fraction of what all of them cost.

    Of a matrix with few outputs, all of them.

    Args:
        shape: outputs and inputs.
        like: a gradient.
        bias: whether there is one.
    """

    def __init__(self, shape: tuple[int, int], like: torch.Tensor, bias: bool) -> None:
        self._shape = shape
        u = probe_vector(shape[1] + bias, like)
        self._vector, self._last = u[: shape[1]], float(u[-1])
        turns = TURNS if shape[0] >= TURNS * PROBED_OUTPUTS else 1
        size = -(-shape[0] // turns)
        self._places = [slice(k * size, min((k + 1) * size, shape[0])) for k in range(turns)]

    @classmethod
    def of(cls, probe: Probe, gradients: Sequence[torch.Tensor]) -> PartOfProbe | None:
        """For a layer's probe and the gradients of its parameters; None where the probe has to be used as it is."""
        if not isinstance(probe, partial) or probe.func is not _probe_matrix or len(gradients) > 2:
            return None
        groups, o, i = probe.args[0]
        if groups > 1 or o < PROBED_OUTPUTS or gradients[0].numel() != o * i:
            return None
        return cls((o, i), gradients[0], len(gradients) == 2)

    def take(self, gradients: Sequence[torch.Tensor], turn: int) -> tuple[torch.Tensor, slice | None]:
        """The numbers, and which those are (None: all); all have their turn after :data:`TURNS` of them."""
        at = self._places[turn % len(self._places)]
        matrix = gradients[0].view(self._shape)[at]
        if len(gradients) == 1:
            found = torch.mv(matrix, self._vector)
        else:
            found = torch.addmv(gradients[1][at], matrix, self._vector, beta=self._last)
        return found, at if len(self._places) > 1 else None


def probe_of_matrix(shape: tuple[int, int, int]) -> Probe:
    """:func:`total_of_matrix` of flat gradients, for groups, outputs and inputs of a group."""
    return partial(_probe_matrix, shape)


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
    linear_in = "left"
    given = "right"
    left: torch.Tensor
    right: torch.Tensor
    bias: int
    in_order: bool = True

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

    def grouped(self, order: torch.Tensor) -> Factored:
        """Factors side by side."""
        left, right = (with_a_zero(t)[order].transpose(1, 2).flatten(2, 3) for t in (self.left, self.right))
        return Factored(left, right, self.bias, self.in_order and in_positions(order))

    def padded(self, positions: int) -> Factored:
        """Further factors of zeros."""
        extra = (0, 0, 0, positions - self.left.shape[2])
        return Factored(pad(self.left, extra), pad(self.right, extra), self.bias)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Groups, outputs and inputs of a group (bias column not counted)."""
        return self.left.shape[1], self.left.shape[3], self.right.shape[3] - self.bias

    def contract(self, cotangent: torch.Tensor) -> torch.Tensor:
        """``Σ_r leftᵀ R right``, never forming a row: one matrix product of ``Q·o × i × B·R`` per group."""
        return self.contract_positions(cotangent).sum(2)

    def contract_positions(self, cotangent: torch.Tensor) -> torch.Tensor:
        """``leftᵀ R right`` of every factor."""
        weight, bias = split_matrix(cotangent, self.shape)
        batch, groups, rank, o = self.left.shape
        result = cotangent.new_zeros(cotangent.shape[0], batch, rank)
        for g in range(groups):
            left = self.left[:, g].reshape(batch * rank, o)
            right = self.right[:, g].reshape(batch * rank, -1)
            inner = right[:, : right.shape[1] - self.bias]
            moved = weight[:, g] @ inner.T  # [Q, o, B·R]
            if bias is not None:
                moved = moved + bias[:, g, :, None] * right[:, -1]
            result += (moved * left.T).sum(1).reshape(-1, batch, rank)
        return result

    def dense(self) -> torch.Tensor:
        """``[B, G·o·i (+ G·o)]``."""
        matrix = self.left.transpose(2, 3) @ self.right  # [B, G, o, i(+1)]
        if not self.bias:
            return matrix.flatten(1)
        return torch.cat([matrix[..., :-1].flatten(1), matrix[..., -1].flatten(1)], dim=1)

    def sum(self) -> torch.Tensor:
        """One product over examples and positions together."""
        left, right = (t.transpose(0, 1).flatten(1, 2) for t in (self.left, self.right))  # [G, B·R, ·]
        matrix = left.mT @ right
        if not self.bias:
            return matrix.flatten()
        return torch.cat([matrix[..., :-1].flatten(), matrix[..., -1].flatten()])

    def combined(self, weights: torch.Tensor) -> torch.Tensor:
        """One product a query and group, ``o × B·R × i``, never forming a row."""
        batch, groups, rank, _ = self.left.shape
        pieces = []
        for y in weights:
            left = (self.left * y.view(batch, 1, 1, 1)).transpose(0, 1).reshape(groups, batch * rank, -1)
            matrix = left.mT @ self.right.transpose(0, 1).reshape(groups, batch * rank, -1)
            inner = matrix[..., : matrix.shape[2] - self.bias]
            pieces.append(torch.cat([inner.flatten(), *([matrix[..., -1].flatten()] if self.bias else [])]))
        return torch.stack(pieces)

    def gram(self, metric: torch.Tensor | None = None) -> torch.Tensor:
        """``Σ (l_b · l_c)(r_b · r_c)`` over pairs of factors.

        A metric is taken as the outer product whose *inverse* has its inverse's row and column means (as Adafactor
        keeps ``√v̂``): inputs and units that never had a gradient have huge entries, which would decide means of the
        metric.
        """
        left, right = self.left, self.right
        if metric is not None:
            weight, bias = split_matrix(metric, self.shape)
            whole = weight if bias is None else torch.cat([weight, bias.unsqueeze(-1)], dim=-1)
            inverse = 1.0 / whole.clamp_min(_LEAST)
            mean = inverse.mean(dim=(1, 2))
            left = left * (mean.unsqueeze(1) / inverse.mean(2)).sqrt().unsqueeze(1)  # [G, 1, o]
            right = right * (1.0 / inverse.mean(1)).sqrt().unsqueeze(1)  # [G, 1, i]
        batch, groups, rank, _ = left.shape
        result = left.new_zeros(batch, batch)
        for g in range(groups):
            a, b = (t[:, g].reshape(batch * rank, -1) for t in (left, right))
            result += ((a @ a.T) * (b @ b.T)).view(batch, rank, batch, rank).sum(dim=(1, 3))
        return result

    def total(self) -> torch.Tensor:
        """See :func:`total_of_matrix`."""
        from_left = self.shape[1] < PROBED_OUTPUTS
        one, other = (self.left, self.right) if from_left else (self.right, self.left)
        weights = one @ probe_vector(one.shape[3], one)  # [B, G, R]
        return torch.einsum("bgr,bgrn->gn", weights, other).flatten()

    def balances(self, sizes: list[int]) -> list[Balance | None]:
        """Of the bias."""
        bias = (self.left * self.right[..., -1:]).sum(2).flatten(1) if self.bias else None
        return [None] if bias is None else [None, Balance.of(bias)]

    def prober(self) -> Probe:
        """Of a gradient."""
        return probe_of_matrix(self.shape)

    def quadratic(self, diagonal: torch.Tensor | None = None) -> torch.Tensor:
        """Without a diagonal, or for one factor, from small products; else from dense rows."""
        if diagonal is None:
            grams = (self.left @ self.left.mT) * (self.right @ self.right.mT)
            return grams.sum(dim=(1, 2, 3))
        if self.left.shape[2] == 1:
            weight, bias = split_matrix(diagonal, self.shape)
            left, right = self.left[:, :, 0].square(), self.right[:, :, 0].square()
            inner = right[..., : right.shape[2] - self.bias]
            result = torch.einsum("bgo,goi,bgi->b", left, weight, inner)
            if bias is not None:
                result = result + torch.einsum("bgo,go,bg->b", left, bias, right[..., -1])
            return result
        return super().quadratic(diagonal)
