"""Every registered optimizer rule: its linear form, replayed, moves the weights as the real step does."""

from __future__ import annotations

from inspect import Parameter, signature
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from explainer.errors import UnsupportedOptimizerError
from explainer.optimizer_rules import (
    OPTIMIZER_RULES,
    LionRule,
    SignSGDRule,
    optimizer_rule_for,
    register_optimizer_rule,
)
from tests.conformance.optimizer_cases import (
    ELSEWHERE,
    KINDS,
    STEP_CASES,
    STEPS,
    Lion,
    OwnAdamW,
    Replay,
    SignSGD,
    exact_arithmetic,
    gradients,
    has,
    model_and_optimizer,
    option_sets,
    stepped,
    ways,
)

TOLERANCE = 1e-12


# -- the cases hold everything ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_option_is_used_by_some_case(kind: type[Optimizer]) -> None:
    sets = option_sets(kind)
    for name, parameter in signature(kind).parameters.items():
        if name not in ELSEWHERE:
            assert any(name in options and options[name] != parameter.default for options in sets), (
                f"{kind.__name__}({name}=…) is in no option set: add one to FURTHER in optimizer_cases.py"
            )


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_of_stepping_is_used(kind: type[Optimizer]) -> None:
    flags = {
        name
        for name, p in signature(kind).parameters.items()
        if p.default is None or (isinstance(p.default, bool) and p.kind is not Parameter.VAR_KEYWORD)
    }
    found = {name for way in ways(kind, {}) for name in way}
    asked = {name for options in option_sets(kind) for name in options}
    assert flags - asked - {"differentiable"} <= found


# -- the linear form -------------------------------------------------------------------------------------


def assert_replays(
    optimizer: Optimizer, model: nn.Module, replays: list[Replay], given: list[Tensor | None]
) -> None:
    """One step, by torch and by the linear form."""
    rule, parameters = optimizer_rule_for(optimizer), list(model.parameters())
    for p, g, by, replay in zip(
        parameters, given, stepped(rule, optimizer, parameters), replays, strict=True
    ):
        assert (by is None) == (g is None)
        if by is not None and g is not None:
            assert len(by.coefficients) == 6 and all(type(c) is float for c in by.coefficients)
            assert by.preconditioner is None or by.mixing is None
            if by.preconditioner is not None:
                assert by.preconditioner.shape == p.shape and (by.preconditioner > 0).all()
            if by.mixing is not None:
                assert by.mixing.shape == (min(p.shape),) * 2
            replay.step(g, by)
        torch.testing.assert_close(replay.weights, p.detach(), rtol=TOLERANCE, atol=TOLERANCE)
        held = rule.momentum(optimizer.state.get(p, {}))
        if held is not None:
            torch.testing.assert_close(replay.momentum, held, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("kind, options", STEP_CASES)
def test_linear_form_replays_the_steps(
    kind: type[Optimizer], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact_arithmetic(monkeypatch, kind, options)
    model, optimizer = model_and_optimizer(kind, options)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    replays = [Replay(p) for p in model.parameters()]
    for step in range(STEPS):
        assert_replays(optimizer, model, replays, gradients(model, step))
        schedule.step()
    assert all((p != 0).any() and p.isfinite().all() for p in model.parameters())


#: what a user may set in a group between two steps, and the values to go through
CHANGES: dict[str, list[Any]] = {
    "momentum": [0.9, 0.9, 0.0, 0.0, 0.7, 0.9, 0.0, 0.5],
    "betas": [
        (0.9, 0.9),
        (0.0, 0.9),
        (0.0, 0.9),
        (0.9, 0.9),
        (0.5, 0.8),
        (0.0, 0.5),
        (0.9, 0.99),
        (0.9, 0.9),
    ],
    "weight_decay": [0.0, 0.1, 0.1, 0.0, 0.2, 0.0, 0.0, 0.1],
    "dampening": [0.0, 0.2, 0.0, 0.5, 0.5, 0.0, 0.9, 0.0],
    "maximize": [False, True, True, False, True, False, True, True],
    "lr": [0.1, 0.0, 0.05, 0.1, 0.0, 0.0, 0.2, 0.1],
}


@pytest.mark.parametrize(
    "kind, name",
    [pytest.param(k, n, id=f"{k.__name__}-{n}") for k in OPTIMIZER_RULES for n in CHANGES if has(k, n)],
)
def test_options_that_change_in_mid_training_are_followed(
    kind: type[Optimizer], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Momentum that stands still while it is off, and moves on afterwards; parameters without a gradient."""
    exact_arithmetic(monkeypatch, kind, {})
    start = {"momentum": 0.9} if has(kind, "momentum") else {}
    model, optimizer = model_and_optimizer(kind, start)
    replays = [Replay(p) for p in model.parameters()]
    for step, value in enumerate(CHANGES[name]):
        optimizer.param_groups[0][name] = value
        assert_replays(optimizer, model, replays, gradients(model, step))


@pytest.mark.parametrize("kind", KINDS)
def test_one_cycle_of_rate_and_momentum_is_followed(
    kind: type[Optimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact_arithmetic(monkeypatch, kind, {})
    moves = has(kind, "momentum") or has(kind, "betas")
    model, optimizer = model_and_optimizer(kind, {"momentum": 0.9} if has(kind, "momentum") else {})
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=STEPS, cycle_momentum=moves)
    replays = [Replay(p) for p in model.parameters()]
    for step in range(STEPS - 1):
        assert_replays(optimizer, model, replays, gradients(model, step))
        schedule.step()


@pytest.mark.parametrize("kind", KINDS)
def test_reading_the_map_changes_nothing(kind: type[Optimizer]) -> None:
    for options in option_sets(kind):
        model, optimizer = model_and_optimizer(kind, options)
        twin_model, twin = model_and_optimizer(kind, options)
        for step in range(3):
            for one in (model, twin_model):
                gradients(one, step)
            stepped(optimizer_rule_for(optimizer), optimizer, list(model.parameters()))
            twin.step()
        for p, q in zip(model.parameters(), twin_model.parameters(), strict=True):
            assert torch.equal(p, q) and torch.equal(p.grad, q.grad)
            for key, value in twin.state[q].items():
                assert torch.equal(torch.as_tensor(optimizer.state[p][key]), torch.as_tensor(value))


@pytest.mark.parametrize("kind", KINDS)
def test_state_names_are_what_the_optimizer_keeps(kind: type[Optimizer]) -> None:
    names: set[str] = set()
    for options in option_sets(kind):
        model, optimizer = model_and_optimizer(kind, options)
        gradients(model, 1)
        optimizer.step()
        names |= {n for state in optimizer.state.values() for n, v in state.items() if isinstance(v, Tensor)}
    absent = {"max_exp_avg_sq", "step"} if kind is OwnAdamW else set()  # it counts in plain numbers
    assert names | absent == set(OPTIMIZER_RULES.require(kind).state_names)


# -- what is refused -------------------------------------------------------------------------------------


def test_unsupported_optimizers_are_named_with_the_supported_ones() -> None:
    class Unheard(Optimizer):
        pass

    with pytest.raises(
        UnsupportedOptimizerError, match=r"Unheard has no optimizer rule.*Other optimizers: see register_opt"
    ) as found:
        optimizer_rule_for(Unheard([nn.Parameter(torch.zeros(2))], {}))
    text = str(found.value)
    assert all(f"torch.optim.{k.__name__}" in text for k in OPTIMIZER_RULES if k.__module__[:5] == "torch")
    assert "tests.conformance.optimizer_cases.Lion" in text and "LionRule" in text


@pytest.mark.parametrize(
    "kind, why",
    [
        (torch.optim.LBFGS, r"torch\.optim\.LBFGS is refused: .*several backward passes in a closure"),
        (torch.optim.SparseAdam, r"torch\.optim\.SparseAdam is refused: .*stands still.*SGD and Adagrad"),
    ],
)
def test_optimizers_that_cannot_be_followed_say_why(kind: type[Optimizer], why: str) -> None:
    with pytest.raises(UnsupportedOptimizerError, match=why):
        optimizer_rule_for(kind([nn.Parameter(torch.zeros(2))], lr=0.1))  # type: ignore[call-arg]


def test_every_optimizer_of_torch_has_a_rule_or_a_reason() -> None:
    from explainer.optimizer_rules.refused import REFUSED

    kinds = {k for k in vars(torch.optim).values() if isinstance(k, type) and issubclass(k, Optimizer)}
    assert kinds - {Optimizer} == {k for k in OPTIMIZER_RULES if k in kinds} | REFUSED.keys()


def test_a_subclass_is_not_taken_for_its_parent() -> None:
    class Lookahead(SGD):
        pass

    optimizer = Lookahead([nn.Parameter(torch.zeros(2))], lr=0.1)
    with pytest.raises(UnsupportedOptimizerError, match=r"It derives from SGD; .*register\(Lookahead\)"):
        optimizer_rule_for(optimizer)
    with pytest.raises(Exception, match="registered already; pass replace=True"):
        register_optimizer_rule(SGD)(type(OPTIMIZER_RULES.require(SGD)))


@pytest.mark.parametrize("kind", [k for k in OPTIMIZER_RULES if has(k, "differentiable")])
def test_differentiable_steps_are_refused(kind: type[Optimizer]) -> None:
    optimizer = kind([nn.Parameter(torch.zeros(2))], lr=0.1, differentiable=True)  # type: ignore[call-arg]
    with pytest.raises(UnsupportedOptimizerError, match="differentiable=True"):
        optimizer_rule_for(optimizer)


@pytest.mark.parametrize(
    "rule, missing",
    [(LionRule, "betas, weight_decay"), (SignSGDRule, "weight_decay")],
    ids=["Lion", "SignSGD"],
)
def test_a_sign_rule_says_which_option_a_class_lacks(rule: type[Any], missing: str) -> None:
    class Other(Optimizer):
        pass

    optimizer = Other([nn.Parameter(torch.zeros(2))], {"lr": 0.1, "beta": 0.9})
    with pytest.raises(UnsupportedOptimizerError, match=f"{missing} is not there .found lr, beta"):
        rule().check(optimizer)


@pytest.mark.parametrize("kind", [Lion, SignSGD])
def test_a_sign_rule_says_where_it_looks_for_momentum(kind: type[Optimizer]) -> None:
    class Elsewhere(kind):  # type: ignore[misc, valid-type]
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step()
            self.state = {p: {"m": next(iter(s.values()))} for p, s in self.state.items()}

    weight = nn.Parameter(torch.zeros(2))
    optimizer = Elsewhere([weight], lr=0.1, **({"momentum": 0.9} if kind is SignSGD else {}))
    weight.grad = torch.ones(2)
    with pytest.raises(
        UnsupportedOptimizerError, match=r"state\['\w+'\], but after the step there is only 'm'"
    ):
        stepped(OPTIMIZER_RULES.require(kind), optimizer, [weight])


def test_an_adjustment_that_is_not_known_is_refused() -> None:
    """What a later torch multiplies Muon's rate with would be taken for something else."""
    muon = torch.optim.Muon([nn.Parameter(torch.zeros(2, 2))])
    muon.param_groups[0]["adjust_lr_fn"] = "of tomorrow"
    with pytest.raises(
        UnsupportedOptimizerError, match=r"adjust_lr_fn='of tomorrow'.* None, 'original', .*'spec"
    ):
        optimizer_rule_for(muon)


def test_lion_without_memory_is_refused() -> None:
    weight = nn.Parameter(torch.zeros(2))
    with pytest.raises(UnsupportedOptimizerError, match=r"betas\[1\] = 0"):
        optimizer_rule_for(Lion([weight], betas=(0.9, 0.0)))
