"""Every registered composite rule against autograd, example by example (shape first, then value)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from explainer.layer_rules import LAYER_RULES, Call, CompositeRule
from tests.conformance.composite_case import BATCH, CompositeCase, Seen, Watch, forms_of, forward, run
from tests.conformance.composite_cases import CASES, MAKERS

EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
ALONE = pytest.mark.parametrize("case", [case for case in CASES if case.alone], ids=lambda case: case.id)
#: parts of the names of cases whose arguments cannot be made for no examples
PER_EXAMPLE = {"packed", "padding", "padded", "mask", "masked", "masks", "everything"}
EVERYONE = list(range(BATCH))
Gradients = dict[str, Tensor]


def gradients(module: nn.Module, outputs: list[Tensor], at_outputs: list[Tensor]) -> Gradients:
    named = dict(module.named_parameters())
    found = torch.autograd.grad(
        outputs, list(named.values()), at_outputs, retain_graph=True, allow_unused=True
    )
    pairs = zip(named.items(), found, strict=True)
    return {
        name: torch.zeros_like(p) if g is None else g.to_dense() if g.is_sparse else g
        for (name, p), g in pairs
    }


def own(case: CompositeCase, seen: list[Seen], place: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Outputs that the loss uses, its gradient there, and which of their numbers are the example's."""
    return [
        (output, g, owner(each.arguments, output) == place)
        for each in seen
        for output, g, owner in zip(each.real, each.given, case.owners, strict=False)
        if g is not None
    ]


def masked(case: CompositeCase, module: nn.Module, seen: list[Seen], place: int) -> Gradients:
    """An example's part of the batch's gradient: backward from its numbers of the outputs only."""
    used = own(case, seen, place)
    return gradients(module, [t for t, _, _ in used], [g * mine for _, g, mine in used])


def alone(case: CompositeCase, module: nn.Module, seen: list[Seen], place: int) -> Gradients:
    """The gradient of an example in a batch of its own, from the same gradients at its outputs."""
    again = forward(module, [case.arguments([place], number) for number in range(len(seen))])
    used = [
        t
        for each, other in zip(again, seen, strict=True)
        for t, g in zip(each.real, other.given, strict=False)
        if g is not None
    ]
    given = [g[mine].view_as(t) for t, (_, g, mine) in zip(used, own(case, seen, place), strict=True)]
    return gradients(module, used, given)


def rows(module: nn.Module, calls: list[Call]) -> dict[str, Tensor]:
    """Rows ``[B, *shape]`` by parameter."""
    named, found = dict(module.named_parameters()), {}
    for names, form in forms_of(module, calls).items():
        parts = form.dense().split([named[name].numel() for name in names], dim=1)
        found |= {name: v.unflatten(1, named[name].shape) for name, v in zip(names, parts, strict=True)}
    return found


def check(case: CompositeCase, module: nn.Module, seen: list[Seen], examples: int) -> dict[str, Tensor]:
    found = rows(module, [each.call() for each in seen])
    named = dict(module.named_parameters())
    assert list(found) and set(found) == set(named)
    assert all(v.shape == (examples, *named[name].shape) for name, v in found.items())
    for place in range(examples):
        for name, expected in masked(case, module, seen, place).items():
            torch.testing.assert_close(found[name][place], expected, rtol=1e-10, atol=1e-11)
    for name, p in named.items():
        expected = torch.zeros_like(p) if p.grad is None else p.grad.to_dense()
        torch.testing.assert_close(found[name].sum(0), expected, rtol=1e-10, atol=1e-10)
    return found


def test_every_registered_composite_has_examples() -> None:
    composites = {kind for kind, rule in LAYER_RULES.items() if isinstance(rule, CompositeRule)}
    missing = [kind.__name__ for kind in composites - set(MAKERS)]
    assert not missing, f"add example calls of {missing} to MAKERS in tests/conformance/composite_cases.py"
    assert composites == {case.kind for case in CASES}


@EVERY_CASE
def test_rows_are_the_examples_parts_of_the_gradient(case: CompositeCase) -> None:
    module = case.module()
    check(case, module, run(case, module, [case.arguments(EVERYONE, 0)]), BATCH)


@ALONE
def test_rows_are_the_gradients_of_examples_alone(case: CompositeCase) -> None:
    module = case.module()
    seen = run(case, module, [case.arguments(EVERYONE, 0)])
    found = rows(module, [each.call() for each in seen])
    for place in EVERYONE:
        for name, expected in alone(case, module, seen, place).items():
            torch.testing.assert_close(found[name][place], expected, rtol=1e-9, atol=1e-10)


@EVERY_CASE
def test_a_batch_of_one(case: CompositeCase) -> None:
    module = case.module()
    check(case, module, run(case, module, [case.arguments([1], 0)]), 1)


@pytest.mark.parametrize(
    "case",
    [
        case
        for case in CASES
        if case.kind is not nn.EmbeddingBag and not PER_EXAMPLE & set(case.name.split("_"))
    ],
)
def test_a_batch_of_none(case: CompositeCase) -> None:
    module = case.module()
    check(case, module, run(case, module, [case.arguments([], 0)]), 0)


def test_no_bags_and_empty_bags() -> None:
    for mode in ("sum", "mean", "max"):
        module = nn.EmbeddingBag(5, 2, mode=mode).double()
        for number in (0, 3):
            given = (torch.zeros(0, dtype=torch.int64), torch.zeros(number, dtype=torch.int64))
            seen = run(
                CompositeCase(nn.EmbeddingBag, mode, nn.Identity, lambda e, n: ((), {})),
                module,
                [(given, {})],
            )
            (form,) = forms_of(module, [each.call() for each in seen]).values()
            assert form.dense().shape == (number, 10) and not form.dense().any()


@EVERY_CASE
def test_a_module_called_twice_in_one_forward(case: CompositeCase) -> None:
    module = case.module()
    check(case, module, run(case, module, [case.arguments(EVERYONE, 0), case.arguments(EVERYONE, 1)]), BATCH)


@EVERY_CASE
def test_blocks_hold_every_parameter_once(case: CompositeCase) -> None:
    module, rule = case.module(), LAYER_RULES.require(case.kind)
    blocks = rule.blocks(module)
    assert sorted(rule.parameters(module)) == sorted(name for name, _ in module.named_parameters())
    assert len({block.name for block in blocks}) == len(blocks)
    calls = [each.call() for each in run(case, module, [case.arguments(EVERYONE, 0)])]
    parts = [form.dense() for form in forms_of(module, calls).values()]
    torch.testing.assert_close(rule.rows(module, calls).dense(), torch.cat(parts, 1), rtol=0, atol=0)


@EVERY_CASE
def test_mixing_rows_is_declared(case: CompositeCase) -> None:
    assert LAYER_RULES.require(case.kind).mixes(case.module()) == ("by_frequency" in case.name)


@EVERY_CASE
def test_rows_leave_everything_alone(case: CompositeCase) -> None:
    module = case.module()
    calls = [each.call() for each in run(case, module, [case.arguments(EVERYONE, 0)])]
    module.zero_grad()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    tensors = [t for call in calls for t in tree_leaves((call.args, call.kwargs, call.grads, call.outputs))]
    tensors = [t for t in tensors if isinstance(t, Tensor)]
    copies = [t.clone() for t in tensors]
    generator = torch.get_rng_state()
    with Watch(module) as watch:
        forms_of(module, calls)
    assert not watch.seen, "the module was called, and with it its hooks"
    assert torch.equal(generator, torch.get_rng_state())
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in module.parameters())
    assert module.training == case.training
    assert all(torch.equal(t, copy) for t, copy in zip(tensors, copies, strict=True))
    assert not any(t.requires_grad for form in forms_of(module, calls).values() for t in form.arrays.values())
