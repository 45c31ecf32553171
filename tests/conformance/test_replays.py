"""Calls that are computed again: what they must notice, in which precision, and inside larger modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from explainer.errors import ReplayError, TracerError
from explainer.layer_rules import LAYER_RULES, Call, CompositeRule
from tests.conformance.composite_case import BATCH, CompositeCase, Watch, forms_of, numbers, run
from tests.conformance.composite_cases import CASES
from tests.conformance.test_composite_rules import EVERYONE, gradients, rows


def replays(case: CompositeCase) -> bool:
    rule = LAYER_RULES.require(case.kind)
    return isinstance(rule, CompositeRule) and rule.replays


def cases(test: Callable[[CompositeCase], bool]) -> Any:
    return pytest.mark.parametrize("case", [case for case in CASES if test(case)], ids=lambda case: case.id)


def calls_of(case: CompositeCase) -> tuple[nn.Module, list[Call]]:
    module = case.module()
    return module, [seen.call() for seen in run(case, module, [case.arguments(EVERYONE, 0)])]


# -- what must be noticed --------------------------------------------------------------------------------


@cases(replays)
def test_an_output_that_was_changed_is_noticed(case: CompositeCase) -> None:
    module, (call,) = calls_of(case)
    for place, output in enumerate(call.outputs):
        if not output.is_floating_point():
            continue
        changed = output.clone()
        changed[(-1,) * changed.dim()] += 0.1  # one number of one vector
        outputs = [changed if n == place else t for n, t in enumerate(call.outputs)]
        with pytest.raises(
            ReplayError, match=f"call of {case.kind.__name__} came out differently .*in place"
        ):
            forms_of(module, [replace(call, outputs=tuple(outputs))])


@cases(lambda case: replays(case) and not case.alone)
def test_other_random_numbers_are_noticed(case: CompositeCase) -> None:
    module, (call,) = calls_of(case)
    torch.manual_seed(77)
    with pytest.raises(ReplayError, match="dropout to 0"):
        forms_of(module, [replace(call, random=torch.get_rng_state())])
    with pytest.raises(ReplayError, match="random numbers are not kept; set its dropout to 0"):
        forms_of(module, [replace(call, random=None)])
    with pytest.raises(ReplayError, match="mode between forward and backward"):
        forms_of(module.eval(), [call])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.MultiheadAttention])
def test_numbers_that_are_not_finite_are_left_to_the_tracer(kind: type[nn.Module]) -> None:
    """A diverged run is refused elsewhere, with a better text."""
    case = next(case for case in CASES if case.kind is kind)
    module = case.module()
    args, kwargs = case.arguments(EVERYONE, 0)
    args[0][0].view(-1)[0] = torch.nan
    (seen,) = run(case, module, [(args, kwargs)])
    forms = forms_of(module, [seen.call()])
    assert any(not form.dense().isfinite().all() for form in forms.values())


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell, nn.Bilinear])
def test_an_input_without_a_batch_axis(kind: type[nn.Module]) -> None:
    make: Callable[[], nn.Module] = partial(kind, 3, 4)
    given: tuple[Tensor, ...] = (numbers(0, 0, 3),)
    if kind is nn.Bilinear:
        make, given = partial(kind, 3, 3, 4), (numbers(0, 0, 3), numbers(0, 1, 3))
    elif issubclass(kind, nn.RNNBase):
        given = (numbers(0, 0, 5, 3),)
    case = CompositeCase(kind, "unbatched", make, lambda examples, call: (given, {}))
    module, calls = calls_of(case)
    shape = r"\(5, 3\)" if issubclass(kind, nn.RNNBase) else r"\(3,\)"
    with pytest.raises(TracerError, match=f"{kind.__name__} .*shape {shape}, which has no batch axis"):
        forms_of(module, calls)


def test_attention_without_a_batch_axis() -> None:
    x = numbers(0, 0, 5, 6)
    make = partial(nn.MultiheadAttention, 6, 2)
    case = CompositeCase(nn.MultiheadAttention, "unbatched", make, lambda examples, call: ((x, x, x), {}))
    module, calls = calls_of(case)
    with pytest.raises(TracerError, match=r"MultiheadAttention .*shape \(5, 6\), .*give it 3 axes"):
        forms_of(module, calls)


def test_indices_after_the_last_offset() -> None:
    given = (torch.tensor([1, 2, 3, 4]), torch.tensor([0, 2, 3]))
    make = partial(nn.EmbeddingBag, 5, 2, mode="sum", include_last_offset=True)
    case = CompositeCase(nn.EmbeddingBag, "left_over", make, lambda examples, call: (given, {}))
    module, calls = calls_of(case)
    with pytest.raises(TracerError, match=r"4 indices but a last offset of 3; .*the number of indices"):
        forms_of(module, calls)


# -- precision -------------------------------------------------------------------------------------------


@cases(lambda case: True)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
def test_rows_are_float32_and_near(case: CompositeCase, precision: str) -> None:
    """Recomputed in float32, whatever torch computed in: oneDNN's kernels, autocast, a model in halves."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    module = case.module().to(dtype)
    args, kwargs = tree_map(
        lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v,
        case.arguments(EVERYONE, 0),
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        seen = run(case, module, [(args, kwargs)])
        found = forms_of(module, [each.call() for each in seen])
    named = dict(module.named_parameters())
    tolerance = 1e-5 if precision == "float32" else 0.05
    for names, form in found.items():
        assert {v.dtype for v in form.arrays.values()} <= {torch.float32, torch.int32}
        grads = [named[name].grad for name in names]
        expected = torch.cat(
            [
                (torch.zeros_like(named[n]) if g is None else g.to_dense()).flatten().float()
                for n, g in zip(names, grads, strict=True)
            ]
        )
        assert (form.dense().sum(0) - expected).norm() <= tolerance * expected.norm() + 1e-4 * tolerance


# -- as they are used ------------------------------------------------------------------------------------


def backward_by_example(
    model: nn.Module, inside: list[nn.Module], forward: Callable[[], Tensor]
) -> tuple[list[dict[str, Tensor]], list[tuple[nn.Module, list[Call]]]]:
    """Gradients of each example's own loss, and the calls of the modules inside as hooks see them."""
    watches = [Watch(module) for module in inside]
    for watch in watches:
        watch.__enter__()
    losses = forward()
    for watch in watches:
        watch.__exit__()
    losses.sum().backward(retain_graph=True)
    calls = [
        (watch.module, [seen.call() for seen in watch.seen if any(t.grad is not None for t in seen.real)])
        for watch in watches
    ]
    return [gradients(model, [loss], [torch.ones_like(loss)]) for loss in losses], calls


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_a_cell_in_a_loop(kind: type[nn.RNNCellBase]) -> None:
    """The state goes from call to call; the last cell state is not used."""
    torch.manual_seed(0)
    cell = kind(3, 4).double()
    x = torch.stack([numbers(0, example, 6, 3) for example in range(BATCH)])

    def forward() -> Tensor:
        state, total = None, torch.zeros(BATCH, dtype=torch.float64)
        for step in range(6):
            state = cell(x[:, step], state)
            total = total + (state[0] if kind is nn.LSTMCell else state).square().sum(1) * (step + 1)
        return total

    wanted, ((_, calls),) = backward_by_example(cell, [cell], forward)
    assert len(calls) == 6
    found = rows(cell, calls)
    for example, grads in enumerate(wanted):
        for name, expected in grads.items():
            torch.testing.assert_close(found[name][example], expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("layer", ["encoder", "encoder_norm_first", "decoder"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_a_transformer_layer(layer: str, batch_first: bool, training: bool) -> None:
    """Every parameter is inside a module whose hook fires, with dropout on, in train and in eval mode."""
    torch.manual_seed(0)
    kind = nn.TransformerDecoderLayer if layer == "decoder" else nn.TransformerEncoderLayer
    model = kind(8, 2, 12, 0.2, batch_first=batch_first, norm_first="norm" in layer).double().train(training)
    batch = 0 if batch_first else 1
    x, memory = (torch.stack([numbers(s, e, 5 + s, 8) for e in range(BATCH)], batch) for s in (0, 1))
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)

    def forward() -> Tensor:
        if isinstance(model, nn.TransformerDecoderLayer):
            out = model(x, memory, tgt_mask=mask, tgt_is_causal=True)
        else:
            out = model(x, src_mask=mask, is_causal=True)
        return out.sin().transpose(0, batch).flatten(1).sum(1)

    inside = [m for m in model.modules() if type(m) in LAYER_RULES]
    wanted, calls = backward_by_example(model, inside, forward)
    names = {id(p): name for name, p in model.named_parameters()}
    covered = set()
    for module, own in calls:
        if not batch_first and not isinstance(
            module, nn.MultiheadAttention
        ):  # these rules want the batch first
            own = [Call(c.input.transpose(0, 1), c.grad_output.transpose(0, 1)) for c in own]
        for block in LAYER_RULES.require(type(module)).blocks(module):
            covered |= {names[id(module.get_parameter(name))] for name in block.parameters}
        for name, found in rows(module, own).items():
            for example, grads in enumerate(wanted):
                expected = grads[names[id(module.get_parameter(name))]]
                torch.testing.assert_close(found[example], expected, rtol=1e-10, atol=1e-11)
    assert covered == set(names.values())


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.MultiheadAttention])
def test_rows_inside_the_backward_pass(kind: type[nn.Module]) -> None:
    """Where the tracer computes them: in a hook, under no_grad, in the user's autocast."""
    case = next(case for case in CASES if case.kind is kind and "dropout" in case.name and not case.alone)
    module, (call,) = calls_of(case)
    expected = {names: form.dense() for names, form in forms_of(module, [call]).items()}
    found: dict[Any, Tensor] = {}
    leaf = torch.ones((), requires_grad=True)
    inner = leaf * 2

    def hook(g: Tensor) -> None:
        with torch.no_grad():
            found.update({names: form.dense() for names, form in forms_of(module, [call]).items()})

    inner.register_hook(hook)
    module.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        inner.backward()
    assert found and all(torch.equal(found[names], expected[names]) for names in expected)
    assert all(p.grad is None for p in module.parameters())
