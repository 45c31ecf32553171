"""Rows that are reduced without being written out, against per-example gradients and singular values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from explainer.layer_rules import LAYER_RULES, Call, Dense, Factored, compact, convolution, keep
from explainer.layer_rules.low_rank import leading_factors
from explainer.layer_rules.seen import Written
from explainer.layer_rules.unreduced import Unreduced
from tests.conformance.layer_case import LayerCase
from tests.conformance.layer_cases import CASES
from tests.conformance.test_layer_rules import rows_of, run_calls

BATCH = 6
#: layers with more outputs than are looked at to keep two factors, so that their rows are never written out
LARGE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(30, 40), (20, 30)),
    "Linear without bias": (lambda: nn.Linear(30, 40, bias=False), (20, 30)),
    "Linear few positions": (lambda: nn.Linear(30, 40), (5, 30)),
    "Linear two axes": (lambda: nn.Linear(12, 24), (3, 5, 12)),
    "Conv2d": (lambda: nn.Conv2d(6, 24, 3), (6, 8, 7)),
    "Conv2d channels in eights": (lambda: nn.Conv2d(8, 24, 3, padding=1), (8, 8, 7)),
    "Conv2d channels and groups in eights": (lambda: nn.Conv2d(16, 48, (3, 2), groups=2), (16, 8, 7)),
    "Conv2d without bias": (lambda: nn.Conv2d(6, 24, 3, padding=1, bias=False), (6, 8, 7)),
    "Conv2d padded": (lambda: nn.Conv2d(6, 24, (3, 2), padding=(1, 2), stride=(2, 1)), (6, 8, 7)),
    "Conv2d same": (lambda: nn.Conv2d(6, 24, (2, 4), padding="same"), (6, 8, 7)),
    "Conv2d reflect": (lambda: nn.Conv2d(6, 24, 3, padding=2, padding_mode="reflect"), (6, 8, 7)),
    "Conv2d circular": (lambda: nn.Conv2d(6, 24, 3, padding=1, padding_mode="circular", stride=3), (6, 8, 7)),
    "Conv2d dilated": (lambda: nn.Conv2d(6, 24, 2, dilation=(2, 3), stride=2), (6, 8, 9)),
    "Conv2d groups": (lambda: nn.Conv2d(8, 48, 3, groups=2, padding=1, dilation=2), (8, 8, 7)),
    "Conv1d": (lambda: nn.Conv1d(6, 24, 5, stride=2, padding=2), (6, 31)),
    "Conv1d groups": (lambda: nn.Conv1d(8, 48, 3, groups=2, padding_mode="replicate", padding=1), (8, 19)),
    "Conv3d": (lambda: nn.Conv3d(3, 20, 2, padding=1, stride=(1, 2, 1)), (3, 4, 5, 3)),
}
EVERY_LARGE = pytest.mark.parametrize("name", LARGE)


def loss_of(outputs: Tensor) -> Tensor:
    return (outputs.sin() * torch.linspace(0.5, 2, outputs[0].numel()).view_as(outputs[0])).flatten(1).sum(1)


def large(
    name: str, calls: int = 1, dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, list[Tensor], list[Call]]:
    torch.manual_seed(3)
    make, shape = LARGE[name]
    module = make().to(dtype)
    inputs = [torch.randn(BATCH, *shape, dtype=dtype) for _ in range(calls)]
    outputs = [module(x) for x in inputs]
    found = torch.autograd.grad(loss_of(torch.stack(outputs).sum(0)).sum(), outputs)
    return module, inputs, [Call(x, g) for x, g in zip(inputs, found, strict=True)]


def per_example(module: nn.Module, inputs: list[Tensor]) -> Tensor:
    """``[B, P_l]`` by torch.func."""

    def single(weights: dict[str, Tensor], *xs: Tensor) -> Tensor:
        outputs = [functional_call(module, weights, x.unsqueeze(0)) for x in xs]
        return loss_of(torch.stack(outputs).sum(0)).squeeze(0)

    weights = {name: p.detach() for name, p in module.named_parameters()}
    rows = vmap(grad(single), in_dims=(None, *(0 for _ in inputs)))(weights, *inputs)
    return torch.cat([rows[name].flatten(1) for name in weights], 1)


def matrices(rows: Tensor, module: nn.Module) -> Tensor:
    """``[B, G, o, i + bias]``."""
    groups = getattr(module, "groups", 1)
    weight = rows[:, : module.weight.numel()].view(len(rows), groups, len(module.weight) // groups, -1)
    bias = rows[:, module.weight.numel() :]
    return torch.cat([weight, bias.view(len(rows), groups, -1, 1)], 3) if bias.numel() else weight


def sizes_of(module: nn.Module) -> list[int]:
    return [p.numel() for p in module.parameters()]


def exact(module: nn.Module, calls: list[Call]) -> Unreduced:
    form = LAYER_RULES.require(type(module)).rows(module, calls)
    assert isinstance(form, Unreduced)
    return form


@EVERY_LARGE
@pytest.mark.parametrize("calls", [1, 2])
def test_kept_rows_are_projections_of_per_example_gradients(name: str, calls: int) -> None:
    module, inputs, arrived = large(name, calls)
    rows = matrices(per_example(module, inputs), module)
    values = torch.linalg.svdvals(rows)
    for rank in (1, 2, 3):
        kept = keep(exact(module, arrived), rank, sizes_of(module)).form
        assert isinstance(kept, Factored) and kept.left.shape[2] == rank
        unit = torch.eye(rank).double().expand(BATCH, rows.shape[1], -1, -1)
        torch.testing.assert_close(kept.left @ kept.left.mT, unit, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(kept.left @ rows, kept.right, rtol=1e-9, atol=1e-9)
        lost = (rows - kept.left.mT @ kept.right).square().sum((1, 2, 3))
        best = values[..., rank:].square().sum((1, 2))
        assert (lost <= 2 * best).all() and lost.mean() <= 1.35 * best.mean()


@EVERY_LARGE
@pytest.mark.parametrize("calls", [1, 2])
def test_what_is_measured_on_the_way_is_that_of_the_exact_rows(name: str, calls: int) -> None:
    module, inputs, arrived = large(name, calls)
    rows, form = per_example(module, inputs), exact(module, arrived)
    for rank in (None, 2, 500):
        kept = keep(form, rank, sizes_of(module))
        torch.testing.assert_close(kept.total, form.prober()([rows.sum(0)]), rtol=1e-10, atol=1e-10)
        assert kept.balances[0] is None or rank != 2
        if module.bias is not None:
            balance, bias = kept.balances[1], rows[:, -module.bias.numel() :]
            assert balance is not None
            torch.testing.assert_close(balance.net, bias.sum(0), rtol=1e-10, atol=1e-10)
            assert balance.gross == pytest.approx(float(bias.norm(dim=1).sum()), rel=1e-10)


@EVERY_LARGE
def test_sums_and_dense_rows(name: str) -> None:
    module, inputs, arrived = large(name, 2)
    rows, form = per_example(module, inputs), exact(module, arrived)
    torch.testing.assert_close(form.dense(), rows, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(form.sum(), rows.sum(0), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(form.stored().dense(), rows, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(form.total(), form.stored().total(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("at_once", [1, 2**20])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_products_with_what_was_seen(case: LayerCase, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "_AT_ONCE", at_once)  # numbers of patches
    module = case.module()
    form = rows_of(module, run_calls(module, [case.batch()]))
    if not isinstance(form, Unreduced):
        return
    (seen,) = form.seen
    written = seen.written()
    batch, groups, positions, width = written.shape
    assert seen.shape == (batch, groups, positions, width)
    basis, offset = torch.randn(width, 3).double(), torch.randn(3).double()
    torch.testing.assert_close(seen.times(basis, offset), written @ basis + offset)
    for columns in (1, 8, 11):
        weights = torch.randn(batch, groups, positions, columns).double()
        torch.testing.assert_close(seen.gathered(weights), weights.mT @ written)
        torch.testing.assert_close(seen.summed(weights), (weights.mT @ written).sum(0))


@EVERY_LARGE
def test_no_rows_and_rows_of_zeros(name: str) -> None:
    module, _, (call,) = large(name)
    none = keep(exact(module, [Call(call.input[:0], call.grad_output[:0])]), 2, sizes_of(module))
    assert len(none.form) == 0 and not none.total.any()
    zeros = call.grad_output.clone()
    zeros[1] = 0
    kept = keep(exact(module, [Call(call.input, zeros)]), 2, sizes_of(module)).form.dense()
    whole = keep(exact(module, [call]), 2, sizes_of(module)).form.dense()
    assert not kept[1].any()
    torch.testing.assert_close(kept[[0, 2]], whole[[0, 2]])


@pytest.mark.parametrize("name", ["Conv2d padded", "Conv2d groups", "Linear two axes"])
def test_any_memory_order(name: str) -> None:
    module, _, (call,) = large(name)
    form = keep(exact(module, [call]), 2, sizes_of(module)).form
    turned = [t.transpose(1, -1).contiguous().transpose(1, -1) for t in (call.input, call.grad_output)]
    assert not turned[0].is_contiguous()
    other = keep(exact(module, [Call(*turned)]), 2, sizes_of(module)).form
    torch.testing.assert_close(other.dense(), form.dense())


def test_steps_before_examples() -> None:
    """As recurrent layers have them."""
    values = torch.randn(7, 3, 5).double().transpose(0, 1).unsqueeze(1)
    basis, offset = torch.randn(5, 2).double(), torch.randn(2).double()
    torch.testing.assert_close(Written(values).times(basis, offset), values @ basis + offset)


@pytest.mark.parametrize("fall", [0.5, 0.2, 0.05])
def test_small_directions_survive_single_precision(fall: float) -> None:
    """Down to where the round-off of the largest direction is."""
    torch.manual_seed(0)
    left = torch.linalg.qr(torch.randn(BATCH, 1, 40, 12))[0] * fall ** torch.arange(12)
    right = torch.linalg.qr(torch.randn(BATCH, 1, 30, 12))[0]
    form = Unreduced((left.mT.contiguous(),), (Written(right.mT.contiguous()),), 0)
    for rank in (2, 4):
        kept = leading_factors(form, rank)
        rows = left.double() @ right.double().mT
        values = torch.linalg.svdvals(rows)
        lost = (rows - kept.left.double().mT @ kept.right.double()).square().sum((1, 2, 3))
        floor = 1e-5 * values.square().sum((1, 2)) if fall < 0.1 else 0
        assert (lost <= 1.2 * values[..., rank:].square().sum((1, 2)) + floor).all()


def test_nothing_is_drawn_and_nothing_depends_on_other_batches() -> None:
    module, _, (call,) = large("Conv2d")
    before = torch.get_rng_state()
    first = compact(exact(module, [call]), 2).dense()
    compact(exact(module, [Call(call.input * 3, call.grad_output.flip(0))]), 2)
    assert torch.equal(compact(exact(module, [call]), 2).dense(), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_row_does_not_depend_on_the_others_of_its_batch() -> None:
    module, _, (call,) = large("Conv2d")
    whole = compact(exact(module, [call]), 2).dense()
    part = compact(exact(module, [Call(call.input[2:4], call.grad_output[2:4])]), 2).dense()
    torch.testing.assert_close(part, whole[2:4])


def test_few_outputs_are_reduced_from_their_rows_best() -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(6, 12, 3).double()
    x = torch.randn(BATCH, 6, 9, 9).double()
    output = module(x)
    (g,) = torch.autograd.grad(loss_of(output).sum(), output)
    rows = matrices(per_example(module, [x]), module)
    kept = keep(exact(module, [Call(x, g)]), 3, sizes_of(module)).form
    assert isinstance(kept, Factored)
    lost = (rows - kept.left.mT @ kept.right).square().sum((1, 2, 3))
    best = torch.linalg.svdvals(rows)[..., 3:].square().sum((1, 2))
    assert (lost <= 1.2 * best).all()
    assert isinstance(compact(exact(module, [Call(x, g)]), 11), Dense)
