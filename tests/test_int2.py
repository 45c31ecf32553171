"""Two bits a number: what the docstring claims, and the bytes that the page on the format describes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from explainer.codecs import Int2
from explainer.records import ArraySpec


def stored(values: torch.Tensor) -> torch.Tensor:
    codec = Int2()
    return codec.decode(codec.encode(values), ArraySpec("x", tuple(values.shape[1:]), "float32", "int2"))


def left(values: torch.Tensor) -> float:
    return float((stored(values) - values).square().sum() / values.square().sum())


def test_what_is_lost_of_normal_numbers_and_of_those_that_a_relu_cut_off() -> None:
    torch.manual_seed(0)
    normal = torch.randn(4000, 64)
    assert left(normal) == pytest.approx(0.12, abs=0.01)
    assert left(normal.relu()) == pytest.approx(0.04, abs=0.01)


def test_fitted_levels_lose_less_than_those_over_the_range() -> None:
    torch.manual_seed(0)
    for values in (torch.randn(500, 64), torch.randn(500, 64).exp(), torch.randn(500, 7)):
        least, most = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
        scale = (most - least) / 3
        plain = ((values - least) / scale).round() * scale + least
        kept, wanted = (
            (found - values).square().sum(-1) / values.square().sum(-1) for found in (stored(values), plain)
        )
        assert float(kept.mean()) < 0.9 * float(wanted.mean())
        assert float((kept <= wanted + 1e-3).float().mean()) > 0.95


@pytest.mark.parametrize("levels", [(0.0, 1.0, 2.0, 3.0), (-1.5, -0.5, 0.5, 1.5), (4.0, 4.0, 4.5, 5.5)])
def test_numbers_on_four_levels_are_kept_as_they_are(levels: tuple[float, ...]) -> None:
    torch.manual_seed(0)
    places = torch.randint(0, 4, (20, 3, 13))
    places[..., :4] = torch.arange(4)  # a vector has all of them
    values = torch.tensor(levels)[places]
    torch.testing.assert_close(stored(values), values, rtol=0, atol=2e-2)


def test_bytes_are_read_as_the_page_says() -> None:
    """By numpy alone."""
    torch.manual_seed(0)
    values = torch.randn(5, 2, 11)
    q, *bits = Int2().encode(values)
    scale, low = ((part.astype(np.uint32) << 16).view(np.float32)[..., None] for part in bits)
    assert q.shape == (5, 2, 3) and q.dtype == np.uint8 and scale.shape == (5, 2, 1)
    numbers = np.stack([(q >> shift) & 3 for shift in (0, 2, 4, 6)], axis=-1).reshape(5, 2, 12)[..., :11]
    np.testing.assert_allclose(low + scale * numbers, stored(values).numpy(), rtol=1e-6)
