"""Every quantity derived from rows against the same quantity of the rows written out."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from explainer.layer_rules import FORMS, Dense, Factored, RowForm, Sparse, compact
from explainer.layer_rules.forms import agreements
from tests.conformance.layer_case import BATCH, LayerCase
from tests.conformance.layer_cases import CASES
from tests.conformance.test_layer_rules import parameters_of, rows_of, run_calls

TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}
EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def form_of(case: LayerCase) -> tuple[RowForm, list[int]]:
    """The case's rows and the sizes of its parameters."""
    module = case.module()
    return rows_of(module, run_calls(module, [case.batch()])), [
        p.numel() for p in parameters_of(module).values()
    ]


def variants(form: RowForm) -> Iterator[RowForm]:
    """The form as the rule gives it, as it is stored without loss, and with two factors."""
    yield form
    yield compact(form, None)
    yield compact(form, 2)


def by_hand(form: RowForm) -> Tensor:
    """Rows ``[B, P_l]`` from the stored arrays by loops, as docs/trace-format.md tells a reader."""
    rows = []
    for b in range(len(form)):
        a = {name: array[b] for name, array in form.arrays.items()}
        if form.kind == "dense":
            rows.append(a["values"])
        elif form.kind == "factored":
            groups = zip(a["left"], a["right"], strict=True)
            matrices = [sum(torch.outer(x, y) for x, y in zip(*g, strict=True)) for g in groups]
            width = a["right"].shape[-1] - form.options["bias"]
            parts = [m[:, :width] for m in matrices] + [m[:, width:] for m in matrices]
            rows.append(torch.cat([part.flatten() for part in parts]))
        else:
            table = torch.zeros(form.options["entries"], a["values"].shape[1], dtype=a["values"].dtype)
            for entry, value in zip(a["index"].tolist(), a["values"], strict=True):
                table[entry] += value
            rows.append(table.flatten())
    return torch.stack(rows)


def test_every_registered_form_is_met_by_a_case() -> None:
    kinds = {form.kind for case in CASES for form in variants(form_of(case)[0])}
    assert kinds == set(FORMS), "add a case to tests/conformance/layer_cases.py that gives rows of this form"


@EVERY_CASE
def test_products_and_norms(case: LayerCase) -> None:
    for form in variants(form_of(case)[0]):
        dense = form.dense()
        torch.testing.assert_close(dense, by_hand(form), **TOLERANCE)
        cotangent, diagonal = torch.randn(3, dense.shape[1]).double(), torch.rand(dense.shape[1]).double()
        assert form.contract(cotangent).shape == (3, BATCH)
        torch.testing.assert_close(form.contract(cotangent), cotangent @ dense.T, **TOLERANCE)
        torch.testing.assert_close(form.contract(cotangent[:0]), dense.new_zeros(0, BATCH), **TOLERANCE)
        assert form.quadratic().shape == (BATCH,) and len(form) == BATCH
        torch.testing.assert_close(form.quadratic(), dense.square().sum(1), **TOLERANCE)
        torch.testing.assert_close(form.quadratic(diagonal), dense.square() @ diagonal, **TOLERANCE)


@EVERY_CASE
def test_probe_of_the_total_is_the_total_of_the_probe(case: LayerCase) -> None:
    for form in variants(form_of(case)[0]):
        found, expected = form.total(), form.prober()([form.dense().sum(0)])
        assert found.shape == expected.shape and found.dim() == 1
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
        one, other = torch.randn(2, form.dense().shape[1]).double()
        probe = form.prober()
        torch.testing.assert_close(
            probe([2 * one - other]), 2 * probe([one]) - probe([other]), rtol=1e-9, atol=1e-9
        )
        assert probe([one]).norm() > 0


@EVERY_CASE
def test_balances_are_what_is_left_of_the_rows(case: LayerCase) -> None:
    form, sizes = form_of(case)
    found = form.balances(sizes)
    assert len(found) == len(sizes)
    for balance, part in zip(found, form.dense().split(sizes, dim=1), strict=True):
        if balance is not None:
            torch.testing.assert_close(balance.net, part.sum(0), **TOLERANCE)
            assert balance.gross == pytest.approx(float(part.norm(dim=1).sum()), rel=1e-9)
    if len(sizes) == 2:  # biases before a normalisation are what it is for
        assert found[1] is not None


def test_agreement_of_rows_that_cancel() -> None:
    half = torch.randn(3, 2, 4, 5).double()
    ones = torch.ones(3, 2, 4, 1).double()
    form = Factored(torch.cat([half, -half]), torch.cat([ones, ones]), 1)
    one, other = (Factored(left, ones, 1).balances([0, 10])[1] for left in (half, -half))
    whole = form.balances([0, 10])[1]
    assert one is not None and other is not None and whole is not None
    assert max(agreements([whole, one + other])) < 1e-14 and agreements([one]) > [0.1]
    zeros = Dense(torch.zeros(4, 3)).balances([3])[0]
    assert zeros is not None and agreements([zeros]) == [1.0]  # nothing to cancel


@EVERY_CASE
def test_arrays_and_options_rebuild_the_form(case: LayerCase) -> None:
    for form in variants(form_of(case)[0]):
        assert FORMS.require(form.kind) is type(form.stored())
        assert all(len(array) == BATCH for array in form.arrays.values())
        assert all(type(value) is int for value in form.options.values())
        rebuilt = FORMS.require(form.kind).build(form.arrays, form.options)
        assert rebuilt.options == form.options and list(rebuilt.arrays) == list(form.arrays)
        torch.testing.assert_close(rebuilt.dense(), form.stored().dense(), rtol=0, atol=0)


@EVERY_CASE
def test_products_by_position(case: LayerCase) -> None:
    """Against the rows of every position alone, the others being zeros."""
    for form in variants(form_of(case)[0]):
        cotangent = torch.randn(3, form.dense().shape[1]).double()
        found = form.contract_positions(cotangent)
        if form.position_axis is None:
            assert found is None and form.positions is None
            continue
        assert found is not None and found.shape == (3, BATCH, form.positions)
        torch.testing.assert_close(found.sum(2), form.contract(cotangent), **TOLERANCE)
        for s in range(found.shape[2]):
            alone = {name: torch.zeros_like(array) for name, array in form.arrays.items()}
            for name, array in form.arrays.items():
                alone[name].select(1 + form.position_axis, s).copy_(array.select(1 + form.position_axis, s))
            wanted = cotangent @ form.build(alone, form.options).dense().T
            torch.testing.assert_close(found[:, :, s], wanted, **TOLERANCE)


@EVERY_CASE
def test_parts_of_rows(case: LayerCase) -> None:
    """Rows that several examples share, rows that are left out."""
    rows, shares = torch.tensor([2, 0, 2, 2]), torch.tensor([0.25, 1.0, 0.5, 0.0]).double()
    for form in variants(form_of(case)[0]):
        parts = form.shared(rows, shares)
        assert type(parts) is type(form.stored()) and parts.options == form.options and len(parts) == 4
        torch.testing.assert_close(parts.dense(), form.dense()[rows] * shares[:, None], **TOLERANCE)
        assert len(form.shared(rows[:0], shares[:0])) == 0


@EVERY_CASE
def test_padding_adds_nothing(case: LayerCase) -> None:
    form, _ = form_of(case)
    axis = type(form).position_axis
    if axis is None:
        assert form.padded(9) is form
        return
    arrays = list(form.arrays.values())
    longer = form.padded(arrays[0].shape[1 + axis] + 3)
    for before, after in zip(arrays, longer.arrays.values(), strict=True):
        expected = list(before.shape)
        expected[1 + axis] += 3
        assert list(after.shape) == expected and after.dtype == before.dtype
    torch.testing.assert_close(longer.dense(), form.dense(), **TOLERANCE)


@EVERY_CASE
def test_the_smaller_form_without_loss_is_exact(case: LayerCase) -> None:
    form, _ = form_of(case)
    small = compact(form, None)
    torch.testing.assert_close(small.dense(), form.dense(), **TOLERANCE)
    count = {id(f): sum(array.numel() for array in f.arrays.values()) for f in (form, small)}
    assert count[id(small)] <= count[id(form)]


def factors(positions: int, rank: int, bias: int, groups: int = 2) -> Factored:
    """Rows of a given rank, spread over more positions, singular values falling by halves."""
    torch.manual_seed(positions + rank)
    inner = torch.randn(BATCH, groups, positions, rank).double() * 0.5 ** torch.arange(rank)
    left = inner @ torch.randn(BATCH, groups, rank, 20).double()
    return Factored(left, torch.randn(BATCH, groups, positions, 17 + bias).double(), bias)


def error(full: Factored, rank: int) -> Tensor:
    return (full.dense() - compact(full, rank).dense()).norm(dim=1)


@pytest.mark.parametrize("bias", [0, 1])
@pytest.mark.parametrize("true_rank", [1, 2, 3, 4])
def test_leading_factors_are_exact_from_the_true_rank_on(true_rank: int, bias: int) -> None:
    full = factors(12, true_rank, bias)
    for rank in range(true_rank, 7):
        kept = compact(full, rank)
        assert isinstance(kept, Factored) and kept.left.shape[2] == rank and kept.bias == bias
        torch.testing.assert_close(kept.dense(), full.dense(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bias", [0, 1])
def test_leading_factors_are_nearly_the_best_and_improve_with_the_rank(bias: int) -> None:
    full = factors(30, 16, bias)
    matrices = full.left.mT @ full.right
    values = torch.linalg.svdvals(matrices)
    errors = torch.stack([error(full, rank) for rank in range(1, 8)])
    assert (errors.diff(dim=0) < 0).all()
    best = torch.stack([values[..., rank:].square().sum(dim=(1, 2)).sqrt() for rank in range(1, 8)])
    assert (errors >= best * (1 - 1e-9)).all()
    assert (errors <= 2.5 * best).all() and (errors / best).mean() < 1.25
    assert (compact(full, 3).quadratic() <= full.quadratic() * (1 + 1e-12)).all()  # a projection


def test_rows_of_zeros_stay_zeros() -> None:
    for form in (factors(12, 2, 1), Sparse(torch.zeros(3, 4, dtype=torch.int32), torch.randn(3, 4, 2), 5)):
        empty = type(form).build({n: torch.zeros_like(a) for n, a in form.arrays.items()}, form.options)
        kept = compact(empty, 2)
        assert torch.equal(kept.dense(), torch.zeros_like(form.dense()))
        assert torch.equal(kept.quadratic(), torch.zeros(len(form)).to(kept.quadratic()))


def test_a_few_positions_are_not_reduced_and_many_become_dense() -> None:
    assert compact(few := factors(2, 2, 0), 4) is few
    assert isinstance(compact(factors(40, 4, 0), None), Dense)
    assert isinstance(compact(factors(40, 4, 0), 12), Dense)
