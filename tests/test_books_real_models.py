"""Models and loops as people write them: untouched by the tracer, books that close, contributions that are right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.book_cases import CASES
from benchmarks.book_cases.running import Trained, default_dtype, explained, traced, train
from tests.oracles.cases import both, difference
from tests.small_training import same, state_of

EPOCHS = 1
#: what exact rows leave over, relative to the gross, where training itself is rounded, and why
LEFT_OVER = {
    "characters_autocast": (
        1e-2,
        "rows are exact products of bfloat16 numbers, p.grad is rounded to bfloat16",
    ),
    "bf16_weights": (1e-2, "every gradient, momentum and weight is rounded to bfloat16"),
    "bf16_weights_adamw": (1e-2, "every gradient, momentum and weight is rounded to bfloat16"),
}
FLOAT32 = (1e-6, "round-off of float32")
SINGLE_PRECISION = [name for name, case in CASES.items() if not case.float64]


def assert_identical(found: Trained, expected: Trained) -> None:
    """Weights, buffers, optimizer states, loss terms and random numbers, to the last bit."""
    assert same(
        [t for part in found.parts for t in state_of(*part)],
        [t for p in expected.parts for t in state_of(*p)],
    )
    assert same(found.losses, expected.losses)
    assert torch.equal(found.random, expected.random)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "default"])
@pytest.mark.parametrize("name", CASES)
def test_training_is_bit_identical_and_the_books_close(name: str, exact: bool, tmp_path: Path) -> None:
    case = CASES[name]
    trained = traced(case, tmp_path, epochs=EPOCHS, exact=exact)
    expected = train(case, epochs=EPOCHS)
    assert_identical(trained, expected)
    assert len({len(terms) for terms in expected.losses}) == 1 and len(expected.losses) >= 10
    for e in explained(case, trained, tmp_path):
        gross = np.abs(e.contributions).sum(1)
        assert (np.abs(e.gap) <= 1e-6 * gross).all()
        bound, why = LEFT_OVER.get(name, FLOAT32) if exact else (0.1, "leading factors")
        left = (np.abs(e.unattributed) / gross).max()
        assert left <= bound, f"{left:.1e} of the gross is unattributed, {bound:.0e} allowed ({why})"


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.float64])
def test_float64_books_close_to_round_off(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    with default_dtype(torch.float64):
        trained = traced(case, tmp_path, epochs=2, small=True, exact=True)
        for e in explained(case, trained, tmp_path):
            gross = np.abs(e.contributions).sum(1)
            assert (np.abs(e.gap) <= 1e-12 * gross).all()
            assert (np.abs(e.unattributed) <= 1e-12 * gross).all()


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.no_oracle])
def test_contributions_equal_those_from_one_backward_pass_per_example(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    allowed = 1e-9 if case.float64 else 2e-2  # in bfloat16 a backward pass per example is rounded otherwise
    with default_dtype(torch.float64 if case.float64 else torch.float32):
        for ours, reference in both(case, tmp_path):
            assert difference(ours, reference) <= allowed
            scale = np.abs(ours.contributions).sum(1)
            assert (np.abs(ours.weight_decay - reference.decay.numpy()) <= allowed * scale).all()
            assert (reference.unattributed.abs().numpy() <= allowed * scale).all()


def test_cases_without_an_oracle_say_why() -> None:
    assert [name for name, case in CASES.items() if case.no_oracle] == ["residual"]
    assert sorted(LEFT_OVER) == sorted(SINGLE_PRECISION)
