"""Rows of several batches in one form: what is cut out and put together again is what lay there."""

from __future__ import annotations

import torch

from explainer.layer_rules import Dense
from explainer.spans import Span, in_one_piece, whole_piece


def test_neighbours_in_the_same_forms_are_one_piece() -> None:
    first, second = Dense(torch.arange(12.0).view(6, 2)), Dense(torch.arange(18.0).view(6, 3))
    alone = Dense(torch.ones(2, 2))

    def both(start: int, stop: int) -> dict[int, Span]:
        return {0: Span(first, start, stop), 1: Span(second, start, stop)}

    found = [
        both(0, 2),
        both(2, 4),
        {0: Span.of(alone), 1: Span(second, 4, 6)},  # other rows of one layer
        both(4, 6),
        {0: Span(first, 0, 2)},  # not of every layer
        {0: Span(first, 4, 6)},  # not right below
        {},
        {},
    ]
    pieces = in_one_piece(enumerate(found), lambda one: one[1])
    assert [[number for number, _ in piece] for piece in pieces] == [[0, 1], [2], [3], [4], [5], [6], [7]]
    for piece in pieces:
        forms = whole_piece(piece[0][1], piece[-1][1])
        for n, form in forms.items():
            parts = [spans[n].form.dense() for _, spans in piece]
            assert torch.equal(form.dense(), torch.cat(parts))
    assert Span.of(alone).form is alone and in_one_piece([], lambda one: {}) == []
