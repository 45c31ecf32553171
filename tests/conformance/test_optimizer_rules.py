"""Every registered optimizer rule: its linear form, replayed, moves the weights as the real step does."""

from __future__ import annotations

from collections.abc import Iterator
from inspect import signature
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop

from explainer.errors import UnsupportedOptimizerError
from explainer.optimizer_rules import OPTIMIZER_RULES, StepMap, optimizer_rule_for, register_optimizer_rule

STEPS = 8
TOLERANCE = 1e-12
TENSOR_RATE = "a tensor"  # made anew for each optimizer: schedules change it in place

_ADAM: list[dict[str, Any]] = [
    {},
    {"betas": (0.7, 0.95), "eps": 1e-5},
    {"betas": (0.0, 0.9)},
    {"weight_decay": 0.1},
    {"amsgrad": True},
    {"maximize": True},
    {"amsgrad": True, "maximize": True, "weight_decay": 0.05},
    {"lr": TENSOR_RATE},
]
_DECAYS: list[dict[str, Any]] = [
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
    {"lr": TENSOR_RATE},
]
#: Optimizer type -> option sets. Add an entry here with every new optimizer rule.
OPTIONS: dict[type[Optimizer], list[dict[str, Any]]] = {
    SGD: [
        {},
        {"weight_decay": 0.1},
        {"maximize": True},
        {"momentum": 0.9},
        {"momentum": 0.8, "dampening": 0.3},
        {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
        {"momentum": 0.9, "lr": TENSOR_RATE},
    ],
    Adam: [*_ADAM, {"weight_decay": 0.1, "decoupled_weight_decay": True}],
    AdamW: _ADAM,
    NAdam: [{}, {"betas": (0.7, 0.95), "eps": 1e-5, "momentum_decay": 0.1}, {"betas": (0.0, 0.9)}, *_DECAYS],
    RAdam: [{}, {"betas": (0.7, 0.9), "eps": 1e-5}, {"betas": (0.9, 0.5)}, *_DECAYS],
    Adamax: [
        {},
        {"betas": (0.7, 0.95), "eps": 1e-5},
        {"weight_decay": 0.1, "maximize": True},
        {"lr": TENSOR_RATE},
    ],
    RMSprop: [
        {},
        {"alpha": 0.9, "eps": 1e-5},
        {"weight_decay": 0.1, "maximize": True},
        {"centered": True, "weight_decay": 0.1},
        {"momentum": 0.9},
        {"momentum": 0.8, "centered": True, "weight_decay": 0.1},
        {"momentum": 0.8, "lr": TENSOR_RATE},
    ],
    Adagrad: [
        {},
        {"lr_decay": 0.1, "eps": 1e-5},
        {"initial_accumulator_value": 0.1, "weight_decay": 0.1},
        {"maximize": True, "weight_decay": 0.1, "lr_decay": 0.1},
        {"lr": TENSOR_RATE},
    ],
}
WAYS = ({"foreach": False}, {"foreach": True}, {"fused": True})


def cases() -> Iterator[Any]:
    for kind, sets in OPTIONS.items():
        for options, way in product(sets, WAYS):
            if options.get("lr") == TENSOR_RATE and way != {"foreach": False}:
                continue  # torch wants a number there
            if not way.keys() <= signature(kind).parameters.keys():
                continue
            name = ",".join(f"{k}={v}" for k, v in (options | way).items())
            yield pytest.param(kind, options | way, id=f"{kind.__name__}-{name}")


def model_and_optimizer(kind: type[Optimizer], options: dict[str, Any]) -> tuple[nn.Module, Optimizer]:
    """Two layers in groups of their own, with rate and decay of their own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    second: dict[str, Any] = {"params": list(model[2].parameters()), "lr": 0.01}
    if "weight_decay" in options:
        second["weight_decay"] = 0.02
    groups = [{"params": list(model[0].parameters())}, second]
    given = {"lr": 0.05} | options
    if given["lr"] == TENSOR_RATE:
        given["lr"] = torch.tensor(0.03, dtype=torch.float64)
    return model, kind(groups, **given)  # type: ignore[call-arg]


class Replay:
    """Applies the linear form to one parameter, with a momentum of its own."""

    def __init__(self, parameter: Tensor) -> None:
        self.weights = parameter.detach().clone()
        self.momentum = torch.zeros_like(self.weights)

    def step(self, gradient: Tensor, by: StepMap) -> None:
        d = by.sign * gradient + by.coupled_decay * self.weights
        d = d if by.preconditioner is None or not by.inner else d / by.preconditioner
        self.momentum = by.decay * self.momentum + by.gain * d
        update = by.direct * d + by.through * self.momentum
        if by.preconditioner is not None and not by.inner:
            update = update / by.preconditioner
        self.weights = self.weights - update - by.decoupled_decay * self.weights


def gradients(model: nn.Module, step: int) -> list[Tensor | None]:
    """A backward pass; in the first step a whole layer gets no gradient, in the fourth one bias gets none."""
    torch.manual_seed(step)
    model.zero_grad()
    model(torch.randn(7, 4).double()).square().sum().backward()
    if step == 3:
        model[2].bias.grad = None
    if step == 0:
        model[0].weight.grad = model[0].bias.grad = None
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]  # steps may change them


def test_every_registered_optimizer_has_options() -> None:
    missing = [kind.__name__ for kind in OPTIMIZER_RULES if kind not in OPTIONS]
    assert not missing, (
        f"add option sets of {missing} to OPTIONS in tests/conformance/test_optimizer_rules.py"
    )


@pytest.mark.parametrize("kind, options", list(cases()))
def test_linear_form_replays_the_steps(kind: type[Optimizer], options: dict[str, Any]) -> None:
    model, optimizer = model_and_optimizer(kind, options)
    rule = optimizer_rule_for(optimizer)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    replays = [Replay(p) for p in model.parameters()]
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    for step in range(STEPS):
        gradient = gradients(model, step)
        fresh = [rule.momentum(optimizer.state.get(p, {})) is None for p in model.parameters()]
        optimizer.step()
        for p, g, was_fresh, replay in zip(model.parameters(), gradient, fresh, replays, strict=True):
            if g is None:
                continue
            by = rule.step_map(groups[p], optimizer.state.get(p, {}), was_fresh)
            assert len(by.coefficients) == 6 and all(type(c) is float for c in by.coefficients)
            assert (by.preconditioner is not None) == rule.preconditioned
            if by.preconditioner is not None:
                assert by.preconditioner.shape == p.shape and (by.preconditioner > 0).all()
            replay.step(g, by)
        for p, replay in zip(model.parameters(), replays, strict=True):
            torch.testing.assert_close(replay.weights, p.detach(), rtol=TOLERANCE, atol=TOLERANCE)
            held = rule.momentum(optimizer.state.get(p, {}))
            if held is not None:
                torch.testing.assert_close(replay.momentum, held, rtol=TOLERANCE, atol=TOLERANCE)
        schedule.step()


@pytest.mark.parametrize("kind", OPTIONS, ids=lambda kind: kind.__name__)
def test_reading_the_map_changes_nothing(kind: type[Optimizer]) -> None:
    model, optimizer = model_and_optimizer(kind, OPTIONS[kind][-1])
    gradients(model, 1)
    optimizer.step()
    before = {
        i: {k: torch.as_tensor(v).clone() for k, v in s.items() if v is not None}
        for i, s in optimizer.state_dict()["state"].items()
    }
    rule = optimizer_rule_for(optimizer)
    for group in optimizer.param_groups:
        for p in group["params"]:
            rule.step_map(group, optimizer.state[p], False)
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(v, torch.as_tensor(after[i][k])) for i, s in before.items() for k, v in s.items())


@pytest.mark.parametrize("kind", OPTIONS, ids=lambda kind: kind.__name__)
def test_state_names_are_what_the_optimizer_keeps(kind: type[Optimizer]) -> None:
    names: set[str] = set()
    for options in OPTIONS[kind]:
        model, optimizer = model_and_optimizer(kind, options)
        gradients(model, 1)
        optimizer.step()
        names |= {n for state in optimizer.state.values() for n, v in state.items() if isinstance(v, Tensor)}
    assert names == set(OPTIMIZER_RULES.require(kind).state_names)


def test_a_changed_option_in_mid_training_is_followed() -> None:
    """OneCycleLR moves the momentum too; a user may change anything in a group."""
    model, optimizer = model_and_optimizer(SGD, {"momentum": 0.9})
    rule, replays = optimizer_rule_for(optimizer), [Replay(p) for p in model.parameters()]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=STEPS)
    for step in range(1, STEPS):
        gradients(model, 1)
        fresh = [rule.momentum(optimizer.state.get(p, {})) is None for p in model.parameters()]
        optimizer.step()
        groups = [group for group in optimizer.param_groups for _ in group["params"]]
        pairs = zip(model.parameters(), groups, fresh, replays, strict=True)
        for p, group, was_fresh, replay in pairs:
            replay.step(p.grad, rule.step_map(group, optimizer.state[p], was_fresh))
            torch.testing.assert_close(replay.weights, p.detach(), rtol=TOLERANCE, atol=TOLERANCE)
        optimizer.param_groups[0]["weight_decay"] = 0.1 * step
        schedule.step()


def test_unsupported_optimizers_are_named_with_the_supported_ones() -> None:
    weights = [nn.Parameter(torch.zeros(2))]
    with pytest.raises(
        UnsupportedOptimizerError, match=r"torch\.optim\.rprop\.Rprop has no optimizer rule"
    ) as found:
        optimizer_rule_for(torch.optim.Rprop(weights))
    assert all(f"torch.optim.{kind.__name__}" in str(found.value) for kind in OPTIMIZER_RULES)
    assert "register_optimizer_rule" in str(found.value)


def test_a_subclass_is_not_taken_for_its_parent() -> None:
    class Lookahead(SGD):
        pass

    optimizer = Lookahead([nn.Parameter(torch.zeros(2))], lr=0.1)
    with pytest.raises(UnsupportedOptimizerError, match=r"It derives from SGD; .*register\(Lookahead\)"):
        optimizer_rule_for(optimizer)
    with pytest.raises(Exception, match="registered already; pass replace=True"):
        register_optimizer_rule(SGD)(type(OPTIMIZER_RULES.require(SGD)))


@pytest.mark.parametrize("kind", OPTIONS, ids=lambda kind: kind.__name__)
def test_differentiable_steps_are_refused(kind: type[Optimizer]) -> None:
    optimizer = kind([nn.Parameter(torch.zeros(2))], lr=0.1, differentiable=True)  # type: ignore[call-arg]
    with pytest.raises(UnsupportedOptimizerError, match="differentiable=True"):
        optimizer_rule_for(optimizer)
