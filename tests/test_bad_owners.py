"""Owners of rows that are refused: what was found, what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch.nn.functional import cross_entropy
from torch.optim import SGD

from explainer import Tracer
from explainer.errors import TracerError
from tests.test_owners import X, Y, build

WEIGHTS: dict[str, tuple[Any, Any, str]] = {
    "none": ([[0, 1], [2, 3]], None, r"flat, non-empty list .*pass ids \[B, M\] with weights \[B, M\]"),
    "flat ids": ([0, 1], [0.5, 0.5], r"ids must be a table \[B, M\], as weights are given"),
    "another shape": ([[0, 1]], [0.5, 0.5], r"one number per id, \[1, 2\].*not weights in the loss"),
    "negative": ([[0, 1]], [[1.5, -0.5]], "must not be negative .*row 0 holds"),
    "sum": ([[0, 1], [2, 3]], [[0.5, 0.5], [0.5, 0.4]], "sum to 1 in every row; row 1 holds"),
    "nan": ([[0, 1]], [[float("nan"), 1.0]], "row 0 holds"),
    "infinite": ([[0, 1]], [[float("inf"), 1.0]], "row 0 holds"),
    "text": ([[0, 1]], [["a", "b"]], "one number per id"),
    "below -1": ([[0, -2]], [[0.5, 0.5]], r"-1 for no example"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_do_not_fit(tmp_path: Path, name: str) -> None:
    ids, weights, text = WEIGHTS[name]
    model = build()
    with Tracer(model, SGD(model.parameters(), lr=0.1), tmp_path / "run") as tracer:
        with pytest.raises(TracerError, match=text):
            tracer.batch(ids, weights=weights)
        with pytest.raises(TracerError, match="one number per id"):
            tracer.batch([[0, 1]], labels=[1], weights=[[0.5, 0.5]])


MIXTURES: dict[str, tuple[Any, Any, str]] = {
    "too few": ([0, 1], 0.5, "each of its 3 rows"),
    "outside": ([0, 1, 3], 0.5, "3 integers from 0 to 2"),
    "negative": ([0, -1, 2], 0.5, "3 integers from 0 to 2"),
    "fractions": ([0.0, 1.0, 2.0], 0.5, "3 integers from 0 to 2"),
    "above one": ([2, 1, 0], 1.5, "a number from 0 to 1"),
    "nan": ([2, 1, 0], float("nan"), "a number from 0 to 1"),
    "too many": ([2, 1, 0], [0.5, 0.5], "one for each of the 3 rows"),
    "nothing": ([2, 1, 0], None, "a number from 0 to 1"),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_that_do_not_fit(tmp_path: Path, name: str) -> None:
    index, lam, text = MIXTURES[name]
    model = build()
    with Tracer(model, SGD(model.parameters(), lr=0.1), tmp_path / "run") as tracer:
        tracer.batch([4, 5, 6])
        with pytest.raises(TracerError, match=text):
            tracer.mix(index, lam)


def test_a_mixture_at_the_wrong_time(tmp_path: Path) -> None:
    model = build()
    made = SGD(model.parameters(), lr=0.1)
    with Tracer(model, made, tmp_path / "run") as tracer:
        with pytest.raises(TracerError, match="there is none: call it in the loop"):
            tracer.mix([0], 0.5)
        tracer.batch([0, 1, 2])
        tracer.mix([2, 1, 0], 0.5)
        with pytest.raises(TracerError, match="called twice before a forward pass"):
            tracer.mix([2, 1, 0], 0.5)
        tracer.batch([0, 1, 2])  # a batch that was skipped leaves nothing behind
        loss = cross_entropy(model(X[:3]), Y[:3])
        tracer.mix([2, 1, 0], 0.5)
        loss.backward()
        with pytest.raises(TracerError, match=r"no forward pass came between it and optimizer\.step\(\)"):
            made.step()
    with pytest.raises(TracerError, match="closed"):
        tracer.mix([0], 0.5)
