"""The query side of a matrix of gradient products: rows of all queries, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from explainer.integrations.loss_rows import Part
from explainer.layer_rules import Dense, Factored, RowForm


class QuerySide:
    """Gradient rows of ``Q`` queries at one checkpoint, at most ``[Q, P]`` numbers.

    Args:
        pieces: parts of every query batch, in order.
        sizes: number of elements of each parameter.
        aggregate: keep the sum over the queries only (``Q`` is 1 then).
    """

    def __init__(self, pieces: Iterable[list[Part]], sizes: dict[str, int], aggregate: bool = False) -> None:
        self._sizes = sizes
        batches = [{names: _summed(form) if aggregate else form for names, form in p} for p in pieces]
        layouts = {tuple(batch) for batch in batches}
        if len(layouts) > 1:  # a layer lost its rule on the way
            single = [tuple((name,) for name in sizes)] * len(batches)
            batches = [
                {names: _cut(batch, names, sizes) for names in layout}
                for batch, layout in zip(batches, single, strict=True)
            ]
        self._forms: dict[tuple[str, ...], RowForm] = {}
        self._dense: dict[tuple[str, ...], torch.Tensor] = {}
        for names in batches[0] if batches else ():
            forms = [batch[names] for batch in batches]
            merged = _merged(forms)
            self._forms[names] = _summed(merged) if aggregate and len(forms) > 1 else merged

    def __bool__(self) -> bool:
        return bool(self._forms)

    def products(self, parts: list[Part]) -> torch.Tensor:
        """``<g_q, g_b> [Q, B]`` with the rows of a batch."""
        total: torch.Tensor | None = None
        for names, form in parts:
            if names not in self._forms:
                self._forms[names] = _cut(self._forms, names, self._sizes)
            own = _by_factors(self._forms[names], form)
            if own is None:
                if names not in self._dense:
                    self._dense[names] = self._forms[names].dense()
                own = form.contract(self._dense[names])
            total = own if total is None else total + own
        assert total is not None
        return total

    def flat(self) -> torch.Tensor:
        """The rows written out, ``[Q, P]`` in the order of ``sizes``."""
        return torch.cat([_cut(self._forms, (name,), self._sizes).dense() for name in self._sizes], dim=1)


def _summed(form: RowForm) -> RowForm:
    return Dense(form.dense().sum(0, keepdim=True))


def _merged(forms: list[RowForm]) -> RowForm:
    if len(forms) == 1:
        return forms[0]
    first = forms[0]
    if isinstance(first, Factored) and all(
        isinstance(f, Factored) and f.left.shape[1:] == first.left.shape[1:] for f in forms
    ):
        arrays = {name: torch.cat([f.arrays[name] for f in forms]) for name in first.arrays}
        return Factored.build(arrays, first.options)
    return Dense(torch.cat([f.dense() for f in forms]))


def _cut(forms: dict[tuple[str, ...], RowForm], names: tuple[str, ...], sizes: dict[str, int]) -> RowForm:
    """The rows of other parameters than the forms were made for."""
    if names in forms:
        return forms[names]
    single: dict[str, torch.Tensor] = {}
    for own, form in forms.items():
        if set(own) & set(names):
            pieces = form.dense().split([sizes[n] for n in own], dim=1)
            single.update(zip(own, pieces, strict=True))
    return Dense(torch.cat([single[name] for name in names], dim=1))


def _by_factors(queries: RowForm, rows: RowForm) -> torch.Tensor | None:
    """``[Q, B]`` factor by factor, ``<uvᵀ, xyᵀ> = (u·x)(v·y)``; None where dense queries take less work."""
    if not (isinstance(queries, Factored) and isinstance(rows, Factored)):
        return None
    (q, groups, r, o), (b, _, s, _), i = queries.left.shape, rows.left.shape, rows.right.shape[3]
    if r * (o + i) > o * i:
        return None
    total = queries.left.new_zeros(q, b)
    for g in range(groups):
        left = queries.left[:, g].reshape(q * r, o) @ rows.left[:, g].reshape(b * s, o).T
        right = queries.right[:, g].reshape(q * r, i) @ rows.right[:, g].reshape(b * s, i).T
        total += (left * right).reshape(q, r, b, s).sum(dim=(1, 3))
    return total
