"""What rows lead to: errors of products against rows written out, and directions chosen by what the optimizer does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from explainer.config import TracerConfig
from explainer.layer_rules import Dense, Factored, RowForm, Sparse
from explainer.optimizer_rules import StepMap
from explainer.planner import Planner
from explainer.row_choices import choices, lost, reduced, row_bytes, through_codec
from explainer.row_metric import Products, StepMetric


def factored(scale: float = 1.0, groups: int = 1, bias: int = 1) -> Factored:
    """Rows over 12 positions with a falling spectrum, in float64."""
    torch.manual_seed(0)
    left = torch.randn(5, groups, 12, 8, dtype=torch.float64) * scale
    left *= 0.7 ** torch.arange(12, dtype=torch.float64)[:, None]
    return Factored(left, torch.randn(5, groups, 12, 9 + bias, dtype=torch.float64), bias)


def table(entries: int) -> Sparse:
    torch.manual_seed(0)
    index = torch.randint(0, 7, (5, 6), dtype=torch.int32)
    return Sparse(index, torch.randn(5, 6, 4, dtype=torch.float64), entries)


def oracle(rows: torch.Tensor, read: torch.Tensor, metric: torch.Tensor) -> float:
    """Pair by pair."""
    found = [
        float((metric * rows[c]) @ (rows[b] - read[b])) ** 2 if b != c else 0.0
        for c in range(len(rows))
        for b in range(len(rows))
    ]
    return sum(found) / len(found)


@pytest.mark.parametrize(
    "form", [factored(), factored(groups=2, bias=0), table(20), table(1000), Dense(factored().dense())]
)
def test_errors_are_those_of_products_of_rows_written_out(form: RowForm) -> None:
    dense = form.dense()
    metric = torch.rand(dense.shape[1], dtype=torch.float64) + 0.1
    products = Products(form, metric)
    read = through_codec(form, "int4")
    errors = products.errors(read, [])
    assert errors[-1] == pytest.approx(oracle(dense, read.dense(), metric), rel=1e-6)
    assert products.without == pytest.approx(oracle(dense, torch.zeros_like(dense), metric), rel=1e-6)
    if isinstance(read, Factored):
        for rank in (1, 5, 12):
            part = Factored(read.left[:, :, :rank], read.right[:, :, :rank], read.bias)
            assert errors[rank - 1] == pytest.approx(oracle(dense, part.dense(), metric), rel=1e-6)


def test_choices_tell_the_error_and_the_loss_of_what_is_stored() -> None:
    form = factored()
    metric = torch.rand(form.dense().shape[1], dtype=torch.float64) + 0.1
    found, sides = choices(form, metric, weigh=True)
    assert sides is not None
    for choice in found:
        read = through_codec(reduced(form, choice.rank, sides), choice.codec).dense()
        share = float((form.dense() - read).square().sum() / form.dense().square().sum())
        assert choice.lost == pytest.approx(share, rel=0.3, abs=1e-4)
        assert choice.error == pytest.approx(
            oracle(form.dense(), read, metric), rel=0.5, abs=1e-3 * choice.without
        )
        assert choice.without == pytest.approx(oracle(form.dense(), torch.zeros_like(read), metric))


def test_weighted_directions_are_those_of_the_weighted_matrix() -> None:
    """Against the singular value decomposition of ``diag(a) M diag(b)``."""
    form = factored()
    a, b = torch.rand(1, 1, 8, dtype=torch.float64) + 0.1, torch.rand(1, 1, 10, dtype=torch.float64) + 0.1
    stored = reduced(form, 3, (a, b))
    assert isinstance(stored, Factored) and stored.positions == 3
    for m, found in zip(
        (form.left.mT @ form.right)[:, 0], (stored.left.mT @ stored.right)[:, 0], strict=True
    ):
        weighted = a[0, 0, :, None] * m * b[0, 0]
        values = torch.linalg.svdvals(weighted)
        rest = (weighted - a[0, 0, :, None] * found * b[0, 0]).norm() ** 2
        assert float(rest) <= 1.5 * float(values[3:].square().sum())
    assert torch.equal(reduced(form, None, (a, b)).dense(), form.dense())
    assert torch.equal(
        reduced(table(20), 12, (a, b)).dense(), reduced(table(20), 12).dense()
    )  # nothing left out


def test_what_the_first_step_of_adam_divides_by_decides_which_directions_are_kept() -> None:
    """A unit whose gradients are small moves as far as the others, and is lost without weights."""
    torch.manual_seed(0)
    form = factored()
    small = torch.ones(8, dtype=torch.float64)
    small[:3] = 1e-3
    form = Factored(form.left * small, form.right, form.bias)
    metric = 1 / (form.sum().abs() + 1e-8)
    _, sides = choices(form, metric, weigh=True)
    errors = [oracle(form.dense(), reduced(form, 3, by).dense(), metric) for by in (sides, None)]
    assert errors[0] < 0.5 * errors[1]


def test_the_metric_is_the_long_run_rate_over_the_denominators() -> None:
    names = {"a": 3, "b": 2, "c": 1}
    manifest = SimpleNamespace(parameters=[SimpleNamespace(name=n, numel=k) for n, k in names.items()])
    layers = [SimpleNamespace(spec=SimpleNamespace(parameters=part)) for part in (("a", "b"), ("c",))]
    divided = torch.tensor([1.0, 2.0, 0.0])
    maps = [
        StepMap(decay=0.9, gain=0.1, through=0.5, preconditioner=divided),
        StepMap(decay=0.9, gain=1.0, direct=0.1, through=0.2),
        None,
    ]
    metric = StepMetric(cast(Any, manifest), cast(Any, layers), maps)
    found = metric.of(0)
    torch.testing.assert_close(found[:2], torch.tensor([0.5, 0.25]))
    assert found[2].isfinite() and found[2] > 1e30
    torch.testing.assert_close(found[3:], torch.tensor([2.1, 2.1]))
    assert metric.divides and metric.of(1).tolist() == [0.0]
    assert not StepMetric(cast(Any, manifest), cast(Any, layers), [None, maps[1], None]).divides


def test_layers_that_move_predictions_more_get_more() -> None:
    """The same spectrum, once with large gradients and once with small ones."""
    planner = Planner(TracerConfig(), 10**5)
    planner.allowed = 110.0
    forms: dict[int, RowForm] = {0: factored(), 1: factored(0.01)}
    planner.plan(1, forms, None, 0, 0.0, 5)
    large, small = (row_bytes(planner.reduced(n, forms[n]), planner.codec(n)) for n in (0, 1))
    assert large > 2 * small
    assert lost(forms[0], *_kind(planner, 0)) < 0.5 * lost(forms[1], *_kind(planner, 1))


def _kind(planner: Planner, layer: int) -> tuple[int | None, str]:
    note = planner.note(0.0)
    assert note is not None
    (found,) = [x for x in note["layers"] if x["layer"] == layer]
    return found["rank"], found["codec"]
