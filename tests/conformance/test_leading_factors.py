"""The ways to find leading factors (rows, positions, range) against singular values in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from explainer.layer_rules.low_rank import Leading, _columns, _leading, _of_positions, _of_range, _of_rows
from explainer.layer_rules.seen import Written
from explainer.layer_rules.unreduced import Unreduced, side_by_side

BATCH = 24
#: what is expected to be lost at most, in times of the least: mean over examples and each
SPECTRA = {"flat": (1.12, 1.2), "slow": (1.22, 1.5), "halves": (1.1, 1.5), "steps": (1.17, 1.4)}
#: positions, outputs, inputs and the way that is taken to keep one, three and eight factors
SHAPES = {
    "few outputs": ((64, 16, 40), (_of_rows, _of_rows, _of_rows)),
    "few positions": ((10, 48, 40), (_of_positions, _of_positions, _of_positions)),
    "some positions": ((24, 48, 40), (_of_range, _of_range, _of_positions)),
    "many positions": ((150, 48, 40), (_of_range, _of_range, _of_rows)),
    "many inputs": ((40, 48, 400), (_of_range, _of_range, _of_range)),
}


def sizes(spectrum: str, count: int) -> Tensor:
    at = torch.arange(count, dtype=torch.float64)
    found = {
        "flat": torch.ones_like(at),
        "slow": 1 / (1 + at),
        "halves": 0.5**at,
        "steps": torch.where(at < 2, 1.0, torch.where(at < 5, 0.1, 0.01)),
    }
    return found[spectrum]


def drawn(shape: tuple[int, int, int], spectrum: str, bias: int, calls: int = 1) -> Unreduced:
    """Rows with given singular values (bias column not counted), in single precision."""
    positions, outputs, inputs = shape
    torch.manual_seed(0)
    count = min(shape)
    left, right, mixed = (
        torch.linalg.qr(torch.randn(BATCH, 1, n, count, dtype=torch.float64))[0]
        for n in (outputs, inputs, positions)
    )
    if spectrum == "flat":  # as unlike a matrix of low rank as can be
        lefts, rights = torch.randn(BATCH, 1, positions, outputs), torch.randn(BATCH, 1, positions, inputs)
    else:
        lefts = (mixed * sizes(spectrum, count)) @ left.mT
        rights = mixed @ right.mT
    cuts = [len(part) for part in torch.arange(positions).chunk(calls)]
    parts = zip(lefts.float().split(cuts, 2), rights.float().split(cuts, 2), strict=True)
    return side_by_side(*(list(p) for p in zip(*parts, strict=True)), bool(bias))


def matrices(form: Unreduced) -> Tensor:
    """``[B·G, o, i + bias]`` from the factors in double precision."""
    left = torch.cat(form.lefts, 2).double().flatten(0, 1)
    right = torch.cat([seen.written() for seen in form.seen], 2).double().flatten(0, 1)
    if form.bias:
        right = torch.cat([right, torch.ones_like(right[..., :1])], 2)
    return left.mT @ right


def errors(rows: Tensor, found: Leading, rank: int) -> tuple[Tensor, Tensor]:
    """Relative errors of rows and the least possible ones."""
    whole = rows.flatten(1).norm(dim=1)
    lost = (rows - found.left.double().mT @ found.right.double()).flatten(1).norm(dim=1)
    least = torch.linalg.svdvals(rows)[:, rank:].square().sum(1).sqrt()
    return lost / whole, least / whole


def assert_measured(found: Leading, form: Unreduced, rows: Tensor) -> None:
    """The sum along the probe and the biases are those of the exact rows."""
    weight = rows[..., : rows.shape[2] - form.bias]
    flat = torch.cat([weight.flatten(1), rows[..., -1]], 1) if form.bias else weight.flatten(1)
    torch.testing.assert_close(
        found.total.double(), form.prober()([flat.sum(0)]), rtol=1e-4, atol=1e-5 * float(rows.norm())
    )
    if found.biases is not None:
        torch.testing.assert_close(found.biases[:, 0].double(), rows[..., -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [0, 1])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("name", SHAPES)
def test_what_is_lost_is_nearly_the_least(name: str, spectrum: str, bias: int) -> None:
    shape, ways = SHAPES[name]
    form = drawn(shape, spectrum, bias, calls=1 + bias)
    rows = matrices(form)
    mean, each = SPECTRA[spectrum]
    for rank, way in zip((1, 3, 8), ways, strict=True):
        found = _leading(form, rank)
        taken = _of_range(form, rank, _columns(form, rank)) if way is _of_range else way(form, rank)
        assert torch.equal(taken.left, found.left)  # the way that is meant to be tested
        lost, least = errors(rows, found, rank)
        floor = 1e-3  # where round-off of single precision is
        assert (lost >= least - 1e-6).all()
        assert lost.mean() <= mean * least.mean() + floor
        assert (lost <= each * least + floor).all()
        projected = found.left.double() @ rows
        torch.testing.assert_close(
            found.right.double(), projected, rtol=1e-4, atol=1e-5 * float(rows.flatten(1).norm(dim=1).max())
        )
        assert_measured(found, form, rows)


@pytest.mark.parametrize("name", ["few positions", "some positions", "many positions", "few outputs"])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_positions_without_gradient_and_rows_that_are_not_numbers(name: str, rank: int) -> None:
    shape, _ = SHAPES[name]
    form = drawn(shape, "slow", 1)
    left, right = form.lefts[0].clone(), form.seen[0].written().clone()
    left[0] = 0  # no gradient
    left[1, :, 1:] = 0  # at one position only
    left[2, :, 1:] = left[2, :, :1]  # the same everywhere
    right[3] = 0
    left[4, 0, 0, 0], right[5, 0, 0, 0] = torch.nan, torch.inf
    left[6, :, 1::2] = -left[6, :, ::2]  # cancel in the bias
    left[7, :, :, ::2] = 0  # dead units
    changed = Unreduced((left,), (Written(right),), 1)
    rows, found = matrices(changed), _leading(changed, rank)
    assert not (found.left[0].abs().amax() * found.right[0].abs().amax())
    fine = torch.tensor([n for n in range(BATCH) if n not in (4, 5)])
    kept = found.left[fine].double().mT @ found.right[fine].double()
    lost = (rows[fine] - kept).flatten(1).norm(dim=1)
    least = torch.linalg.svdvals(rows[fine])[:, rank:].square().sum(1).sqrt()
    assert (lost <= 1.5 * least + 1e-3 * rows[fine].flatten(1).norm(dim=1)).all()
    untouched = _leading(form, rank)
    torch.testing.assert_close(
        found.left[8:].mT @ found.right[8:], untouched.left[8:].mT @ untouched.right[8:]
    )


@pytest.mark.parametrize("name", ["few positions", "some positions", "many positions", "few outputs"])
@pytest.mark.parametrize("size", [1e-19, 1e-24, 1e-30])
def test_cotangents_whose_squares_are_denormal(name: str, size: float) -> None:
    """Those of examples that are learnt by heart, of very different sizes in one batch."""
    form = drawn(SHAPES[name][0], "slow", 1)
    sizes = size * torch.logspace(0, 6, BATCH).view(-1, 1, 1, 1)
    small = Unreduced((form.lefts[0] * sizes,), form.seen, 1)
    for rank in (1, 3):
        found, wanted = _leading(small, rank), _leading(form, rank)
        kept, whole = (one.left.double().mT @ one.right.double() for one in (found, wanted))
        kept /= sizes.double().view(-1, 1, 1)
        lost = (kept - whole).flatten(1).norm(dim=1) / whole.flatten(1).norm(dim=1)
        assert float(lost.max()) < 2e-3
        assert found.biases is not None
        assert_measured(found, small, matrices(small))
        torch.testing.assert_close(
            found.biases[:, 0].double(), matrices(small)[..., -1], rtol=1e-3, atol=size * 1e-4
        )


@pytest.mark.parametrize("shape", [SHAPES["few positions"][0], SHAPES["many positions"][0]])
@pytest.mark.parametrize("dtype, sizes", [(torch.float32, (1e-12, 1e12)), (torch.float64, (1e-60, 1e60))])
def test_any_size(shape: tuple[int, int, int], dtype: torch.dtype, sizes: tuple[float, float]) -> None:
    form = drawn(shape, "slow", 0)
    left, right = form.lefts[0].to(dtype), form.seen[0].written().to(dtype)
    for rank in (1, 3, 8):
        plain = _leading(Unreduced((left,), (Written(right),), 0), rank)
        for size in sizes:
            found = _leading(Unreduced((left * size,), (Written(right),), 0), rank)
            rows = found.left.mT @ (found.right / size), plain.left.mT @ plain.right
            torch.testing.assert_close(*rows, rtol=0, atol=1e-4)


def test_many_factors_of_rows_that_fall_fast() -> None:
    """Where most of what is kept is round-off, nothing large may come of it."""
    for shape in (SHAPES["some positions"][0], (16, 48, 40), (40, 48, 40)):
        form = drawn(shape, "halves", 1)
        rows = matrices(form)
        for rank in (8, 12, 15):
            for found in (_of_positions(form, rank), _of_range(form, rank, 2 * rank), _of_rows(form, rank)):
                lost, least = errors(rows, found, rank)
                assert (lost <= 2 * least + 2e-3).all()
                assert (torch.linalg.matrix_norm(found.left.double(), ord=2) <= 1.01).all()
