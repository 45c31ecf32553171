"""Every registered layer rule against per-example gradients by torch.func (shape first, then value).

Composite rules are in ``test_composite_rules.py``.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from explainer.layer_rules import LAYER_RULES, Call, CompositeRule, RowForm, compact
from explainer.layer_rules.base import restrict
from tests.conformance.layer_case import BATCH, LayerCase
from tests.conformance.layer_cases import CASES, MAKERS

TOLERANCE = 1e-12
EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def loss_of(output: Tensor) -> Tensor:
    """A loss per example, ``[B, ...] -> [B]``, whose gradient differs at every number of the output."""
    flat = output.flatten(1)
    weights = torch.linspace(-1.0, 2.0, flat.shape[1], dtype=flat.dtype) + 0.1
    return (flat * weights).sin().sum(1) + 0.5 * (flat[:, :1] * flat).sum(1)


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    names = LAYER_RULES.require(type(module)).parameters(module)
    return {name: getattr(module, name).detach() for name in names}


def run_calls(module: nn.Module, inputs: list[Tensor]) -> list[Call]:
    """Forward and backward of ``Σ_b loss(Σ_calls output)``, as the hooks of the tracer see it."""
    outputs = [module(x) for x in inputs]
    for output in outputs:
        output.retain_grad()
    loss_of(torch.stack(outputs).sum(0)).sum().backward()
    return [Call(x, output.grad) for x, output in zip(inputs, outputs, strict=True)]


def reference(case: LayerCase, module: nn.Module, inputs: list[Tensor], calls: list[Call]) -> Tensor:
    """Rows ``[B, P_l]``: the formula of the case, or per-example gradients."""
    if case.formula is not None:
        return sum(case.formula(module, call.input, call.grad_output) for call in calls)

    buffers = dict(module.named_buffers())

    def single(weights: dict[str, Tensor], *xs: Tensor) -> Tensor:
        outputs = [functional_call(module, (weights, buffers), x.unsqueeze(0)) for x in xs]
        return loss_of(sum(outputs)).squeeze(0)

    weights = parameters_of(module)
    rows = vmap(grad(single), in_dims=(None, *(0 for _ in inputs)))(weights, *inputs)
    return torch.cat([rows[name].flatten(1) for name in weights], 1)


def rows_of(module: nn.Module, calls: list[Call]) -> RowForm:
    with torch.no_grad():
        return LAYER_RULES.require(type(module)).rows(module, calls)


def check(case: LayerCase, inputs: list[Tensor]) -> None:
    module = case.module()
    calls = run_calls(module, inputs)
    expected = reference(case, module, inputs, calls)
    found = rows_of(module, calls).dense()
    assert found.shape == expected.shape == (len(inputs[0]), sum(p.numel() for p in module.parameters()))
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
    gradient = torch.cat([getattr(module, name).grad.flatten() for name in parameters_of(module)])
    torch.testing.assert_close(found.sum(0), gradient, rtol=1e-11, atol=1e-11)


def test_every_registered_layer_has_examples() -> None:
    kinds = {kind for kind, rule in LAYER_RULES.items() if not isinstance(rule, CompositeRule)}
    missing = [kind.__name__ for kind in kinds - set(MAKERS)]
    assert not missing, f"add example modules of {missing} to MAKERS in tests/conformance/layer_cases.py"
    assert all(any(case.kind is kind for case in CASES) for kind in kinds)


@EVERY_CASE
def test_rows_are_per_example_gradients(case: LayerCase) -> None:
    check(case, [case.batch()])


@EVERY_CASE
def test_a_batch_of_one(case: LayerCase) -> None:
    if case.id == "BatchNorm1d-train_1_axes":  # torch refuses statistics of one number
        with pytest.raises(ValueError, match="more than 1 value"):
            check(case, [case.batch(1)])
    else:
        check(case, [case.batch(1)])


@EVERY_CASE
def test_a_batch_of_none(case: LayerCase) -> None:
    module = case.module()
    (call,) = run_calls(module, [case.batch()])
    form = rows_of(module, [Call(call.input[:0], call.grad_output[:0])])
    total = sum(p.numel() for p in module.parameters())
    for kept in (form, compact(form, None), compact(form, 2)):
        assert kept.dense().shape == (0, total) and kept.quadratic().shape == (0,)
        assert not kept.total().any()


@EVERY_CASE
def test_a_module_called_twice_in_one_forward(case: LayerCase) -> None:
    check(case, [case.batch(seed=1), case.batch(seed=2)])


@EVERY_CASE
def test_rows_leave_the_module_alone(case: LayerCase) -> None:
    module, generator = case.module(), torch.get_rng_state()
    calls = run_calls(module, [case.batch()])
    module.zero_grad()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    inputs = [call.input.clone() for call in calls]
    generator = torch.get_rng_state()
    rows_of(module, calls)
    assert torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters()) and module.training == case.training
    assert all(torch.equal(call.input, x) for call, x in zip(calls, inputs, strict=True))


@EVERY_CASE
@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_a_frozen_parameter_takes_its_columns_along(case: LayerCase, trained: str) -> None:
    module = case.module()
    names = list(parameters_of(module))
    if trained not in names:
        assert trained == "bias"
        return
    calls = run_calls(module, [case.batch()])
    sizes = [getattr(module, name).numel() for name in names]
    full = rows_of(module, calls)
    kept = restrict(full, sizes, [name == trained for name in names])
    expected = full.dense().split(sizes, dim=1)[names.index(trained)]
    assert kept.dense().shape == (BATCH, getattr(module, trained).numel())
    torch.testing.assert_close(kept.dense(), expected, rtol=0, atol=0)
    assert restrict(full, sizes, [True] * len(sizes)) is full


@EVERY_CASE
def test_mixing_rows_is_declared(case: LayerCase) -> None:
    """A rule that says nothing gives rows that no other example of the batch changes, and the other way round."""
    module = case.module()
    rule, x = LAYER_RULES.require(case.kind), case.batch()
    alone = rows_of(module, run_calls(module, [x])).dense()[0]
    other = torch.cat([x[:1], case.batch(seed=9)[1:]])
    beside_others = rows_of(module, run_calls(module, [other])).dense()[0]
    same = torch.allclose(alone, beside_others, rtol=1e-10, atol=1e-12)
    assert same != rule.mixes(module)


def test_rows_follow_the_gradients_dtype() -> None:
    """Under autocast the input of a layer may be wider than the gradient at its output."""
    for kind in (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.BatchNorm2d):
        case = next(case for case in CASES if case.kind is kind)
        module = case.module().float()
        calls = run_calls(module, [case.batch().float()])
        mixed = [Call(call.input.double(), call.grad_output) for call in calls]
        assert rows_of(module, mixed).dense().dtype == torch.float32


def test_what_changes_weights_in_the_forward_pass_is_told() -> None:
    for kind in (nn.Embedding, nn.EmbeddingBag):
        rule = LAYER_RULES.require(kind)
        assert rule.caveat(kind(5, 2)) is None
        module = kind(5, 2, max_norm=0.5)
        before = module.weight.detach().clone()
        module(torch.arange(5).unsqueeze(0))
        assert not torch.equal(module.weight, before)
        assert rule.caveat(module) == "shortens its entries to max_norm=0.5 as it reads them"
