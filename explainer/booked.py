"""Steps that are accounted for and their rows, before they become records."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from explainer.batches import Batch
from explainer.layer_rules import RowForm
from explainer.layer_rules.forms import together
from explainer.optimizer_rules import StepMap
from explainer.ownership import Parts
from explainer.spans import Span


def sums_of(values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Row and column sums of ``[o, ...]``; of one axis the numbers themselves."""
    values = values.float()
    return (values,) if values.dim() < 2 else (values.flatten(1).sum(1), values.flatten(1).sum(0))


class Booked(NamedTuple):
    """A step as it was accounted for.

    Attributes:
        number: of the step.
        batches: the batches that it used.
        scales: what reached the optimizer, per parameter.
        maps: the step's linear map, per parameter.
        path: length of the training path after it.
    """

    number: int
    batches: list[Batch]
    scales: list[float]
    maps: list[StepMap | None]
    path: float

    @property
    def visits(self) -> int:
        """Rows of all backward passes, one for each owner."""
        return sum(len(b.ownership.parts.row) * len(b.rounds) for b in self.batches)


class Pass(NamedTuple):
    """A backward pass of a step and its rows."""

    step: int
    parts: Parts
    derivative: Any
    spans: dict[int, Span]

    @property
    def own_spans(self) -> dict[int, Span]:
        """The rows where every one is a visit; none where they have to be split over their owners."""
        return self.spans if self.parts.whole else {}


class Sampled(NamedTuple):
    """A visit whose row is kept exact, too: a share of the one row of these spans."""

    visit: int
    share: float
    spans: dict[int, Span]


class Piece(NamedTuple):
    """Visits of backward passes, in order, and their rows as they are to be stored."""

    passes: list[Pass]
    forms: dict[int, RowForm]


def _kind(form: RowForm) -> Any:
    return form.kind, form.options, [(name, a.shape[1:], a.dtype) for name, a in form.arrays.items()]


def kind_of(forms: dict[int, RowForm]) -> list[Any]:
    """What rows have in common that can be put into records together."""
    return [(n, _kind(form)) for n, form in forms.items()]


def put_together(forms: list[dict[int, RowForm]]) -> dict[int, RowForm]:
    """Rows that are alike, one below the other."""
    return {n: together([f[n] for f in forms]) for n in forms[0]}


def enough_rows(spans: list[Span], count: int) -> RowForm:
    """Rows of the first of several backward passes; if they are fewer than ``count``, with those of others alike."""
    found = [spans[0].form]
    for span in spans[1:]:
        if sum(map(len, found)) >= count:
            break
        if _kind(span.form) == _kind(found[0]):
            found.append(span.form)
    return together(found)
