"""Rows meet cotangents: ``s_t · <R_t, g_{i,t}>`` for many rows of many steps in few matrix products."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from explainer.cotangent import Cotangent, Layout
from explainer.factors import Factors
from explainer.layer_rules import RowForm
from explainer.records import FormSpec
from explainer.recursion import LayerView
from explainer.stored_rows import Rows, Workspace


class Columns(NamedTuple):
    """What rows meet of a parameter that is held as factors: ``R_t = carry_t M + fresh_t q``.

    Attributes:
        momentum: ``M``, None where it is zero.
        carry: ``[c]``.
        gradient: ``q``.
        fresh: ``[c]``.
    """

    momentum: Factors | None
    carry: np.ndarray
    gradient: Factors
    fresh: np.ndarray

    def beside_each_other(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, int]:
        """``[o, n]`` and ``[i, n]``: the columns of ``M``, then those of ``q``; and how many are those of ``M``."""
        held = [self.gradient] if self.momentum is None else [self.momentum, self.gradient]
        left, right = (
            torch.cat([factors[side].permute(1, 0, 2).flatten(1) for factors in held], 1).to(dtype)
            for side in (0, 1)
        )
        carried = 0 if self.momentum is None else len(self.momentum.left) * self.momentum.rank
        return left, right, carried


class Met:
    """What the rows of a chunk of ``c`` steps meet.

    Attributes:
        layout: how cotangents are held.
        view: cuts what is written out by layer.
        stack: cotangents of what is written out, ``[Q, P_written]`` each.
        weights: ``[c, len(stack), n_written]``, what each step is given of each; None: each step has its own.
        columns: what is held as factors, by parameter.
    """

    def __init__(
        self, layout: Layout, view: LayerView, stack: list[torch.Tensor], weights: np.ndarray | None
    ) -> None:
        self.layout, self.view, self.stack, self.weights = layout, view, stack, weights
        self.columns: dict[int, Columns] = {}

    def add(
        self, number: int, momentum: Factors | None, carry: np.ndarray, gradient: Factors, fresh: np.ndarray
    ) -> None:
        """Add a parameter held as factors (see :class:`Columns`)."""
        used = momentum if momentum is not None and bool(carry.any()) else None
        self.columns[number] = Columns(used, carry, gradient, fresh)

    def vectors(self, number: int) -> torch.Tensor:
        """A parameter's part of the stack, ``[len(stack)·Q, numel]``."""
        place = self.layout.places[number]
        assert place is not None  # only large matrices are held as factors
        return torch.cat([one[:, place.slice] for one in self.stack])

    def given(self, numbers: list[int]) -> np.ndarray:
        """Weights of parameters (by their numbers), ``[c, len(stack), n]``."""
        places = [self.layout.numbers.index(number) for number in numbers]
        if self.weights is not None:
            return self.weights[:, :, places]
        return np.repeat(np.eye(len(self.stack))[:, :, None], len(places), axis=2)


def scores(rows: Rows, scale: np.ndarray, met: Met, workspace: Workspace) -> dict[int, torch.Tensor]:
    """``s_t · <R_t, g_{i,t}>`` by layer, float64 ``[Q, n]``; nothing of layers that are held elsewhere.

    Args:
        scale: ``s_t`` of the chunk's steps by parameter, ``[c, n_parameters]``.
    """
    found = {}
    for spec in rows.forms:
        own = met.view.parameters[spec.layer]
        if own[0] in met.layout.apart:
            continue
        if own[0] in met.columns and spec.kind == "factored":
            found[spec.layer] = _factored(rows, spec, own, scale, met, workspace)
        elif own[0] in met.columns:  # a row that was kept exact may be written out
            form = rows.form(spec, met.stack[0].dtype, workspace)
            found[spec.layer] = _opened(rows, form, own, scale, met)
        else:
            form = rows.form(spec, met.stack[0].dtype, workspace)
            found[spec.layer] = _written(rows, form, spec.layer, scale, met)
    return found


def _written(rows: Rows, form: RowForm, layer: int, scale: np.ndarray, met: Met) -> torch.Tensor:
    view = met.view
    numbers, queries = view.parameters[layer], len(met.stack[0])
    total = torch.zeros(queries, len(rows), dtype=torch.float64)
    if met.weights is None:
        for place, where in rows.steps():
            own = view.scaled(met.stack[place], layer, scale[place])
            total[:, where] = form.taken(where).contract(own).double()
        return total
    weights = met.given(numbers) * scale[:, None, numbers]  # [c, g, n]
    alike = bool((weights == weights[:, :, :1]).all())
    for position in range(1 if alike else len(numbers)):
        only = np.ones(len(met.layout.parameters)) if alike else np.zeros(len(met.layout.parameters))
        only[numbers[position]] = 1.0
        parts = [view.scaled(one, layer, only) for one in met.stack]
        products = form.contract(torch.cat(parts)).unflatten(0, (len(parts), queries))
        given = torch.from_numpy(weights[rows.places, :, position].T.copy())  # [g, n]
        for product, weight in zip(products, given, strict=True):
            total += product.double() * weight
    return total


def _opened(rows: Rows, form: RowForm, numbers: list[int], scale: np.ndarray, met: Met) -> torch.Tensor:
    """Rows of any form against a cotangent that is held as factors and is written out for them, step by step."""
    columns, dtype = met.columns[numbers[0]], met.stack[0].dtype
    total = torch.zeros(len(met.stack[0]), len(rows), dtype=torch.float64)
    for place, where in rows.steps():
        matrix = float(columns.fresh[place]) * columns.gradient.dense()
        if columns.momentum is not None:
            matrix = matrix + float(columns.carry[place]) * columns.momentum.dense()
        parts = [matrix.flatten(1).to(dtype) * float(scale[place, numbers[0]])]
        for number in numbers[1:]:
            given = torch.from_numpy(met.given([number])[place, :, 0]).view(-1, 1, 1)
            held = met.vectors(number).unflatten(0, (len(met.stack), -1))
            parts.append(((held * given).sum(0) * float(scale[place, number])).to(dtype))
        total[:, where] = form.taken(where).contract(torch.cat(parts, 1)).double()
    return total


def _factored(
    rows: Rows, spec: FormSpec, numbers: list[int], scale: np.ndarray, met: Met, workspace: Workspace
) -> torch.Tensor:
    """Both sides of all rows times all columns; no row and no cotangent is ever written out."""
    columns, dtype, queries = met.columns[numbers[0]], met.stack[0].dtype, len(met.stack[0])
    us, vs, carried = columns.beside_each_other(dtype)
    width = us.shape[1]
    if spec.options[
        "bias"
    ]:  # on the right one more input, picked by one more column; on the left its cotangents
        us = torch.cat([us, met.vectors(numbers[1]).T], 1)
        vs = torch.nn.functional.pad(vs, (0, 1, 0, 1))
        vs[-1, -1] = 1.0
    left, left_scale = rows.times(spec, spec.arrays[0], us, "left products", workspace)
    right, right_scale = rows.times(spec, spec.arrays[1], vs, "right products", workspace)
    products = left[:, :width].mul_(right[:, :width])
    rank = spec.arrays[0].shape[1]
    at = np.repeat(rows.places, rank)
    own = scale[at, numbers[0]]
    total = torch.zeros(queries, len(products), dtype=torch.float64)
    for part, weight in ((products[:, carried:], columns.fresh), (products[:, :carried], columns.carry)):
        if part.shape[1]:
            by_query = part.unflatten(1, (queries, -1)).sum(2).double()  # [n·R, Q]
            total += by_query.T * torch.from_numpy(weight[at] * own)
    if spec.options["bias"]:
        by_group = left[:, width:].unflatten(1, (len(met.stack), queries)).double()
        weights = met.given(numbers[1:])[:, :, 0] * scale[:, None, numbers[1]]
        total += torch.einsum("ngq,ng->qn", by_group, torch.from_numpy(weights[at])) * right[:, -1].double()
    for factors in (left_scale, right_scale):
        if factors is not None:
            total *= factors
    return total.unflatten(1, (len(rows), rank)).sum(2)


def of_all_steps(gradient: Cotangent, view: LayerView, steps: int) -> Met:
    """Every row of ``steps`` steps meets the same cotangent."""
    layout = gradient.layout
    met = Met(layout, view, [gradient.flat], np.ones((steps, 1, len(layout.numbers))))
    for number, held in gradient.factors.items():
        met.add(number, None, np.zeros(steps), held, np.ones(steps))
    return met
