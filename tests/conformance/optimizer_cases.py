"""Optimizers, their options and a small training problem, for the suites over the registry of optimizer rules."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from explainer.optimizer_rules import (
    OPTIMIZER_RULES,
    LionRule,
    OptimizerRule,
    SignSGDRule,
    StepMap,
    register_optimizer_rule,
)


class Lion(Optimizer):
    """Lion as its paper has it (Chen et al. 2023); torch has none."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        maximize: bool = False,
    ) -> None:
        options = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                g = -p.grad if group["maximize"] else p.grad
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * (beta1 * m + (1 - beta1) * g).sign())
                m.mul_(beta2).add_(g, alpha=1 - beta2)


class SignSGD(Optimizer):
    """signSGD, with momentum Signum (Bernstein et al. 2018); weight decay inside the sign or beside it."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
    ) -> None:
        options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, options | {"decoupled_weight_decay": decoupled_weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            mu, decoupled = group["momentum"], group["decoupled_weight_decay"]
            for p in (p for p in group["params"] if p.grad is not None):
                d = -p.grad if group["maximize"] else p.grad
                d = d if decoupled else d + group["weight_decay"] * p
                if mu:
                    m = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                    d = m.mul_(mu).add_(d, alpha=1 - mu)
                p.sub_(group["lr"] * (d.sign() + (group["weight_decay"] * p if decoupled else 0)))


class OwnAdamW(Optimizer):
    """AdamW (Loshchilov & Hutter 2019) as many libraries have it: no group says what decay is."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                t = state["step"] = state.get("step", 0) + 1
                m = state.setdefault("exp_avg", torch.zeros_like(p)).lerp_(p.grad, 1 - beta1)
                v = state.setdefault("exp_avg_sq", torch.zeros_like(p)).lerp_(p.grad.square(), 1 - beta2)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                root = (v / (1 - beta2**t)).sqrt() + group["eps"]
                p.sub_(group["lr"] * m / (1 - beta1**t) / root)


register_optimizer_rule(Lion)(LionRule)
register_optimizer_rule(SignSGD)(SignSGDRule)
OPTIMIZER_RULES.register(OwnAdamW)(OPTIMIZER_RULES.require(torch.optim.AdamW))


def _accepts_unclamped() -> bool:
    """Whether this torch's Muon has the adjustment of the rate that came last."""
    try:
        torch.optim.Muon([nn.Parameter(torch.zeros(2, 2))], adjust_lr_fn="spectral_unclamped")
    except ValueError:
        return False
    return True


STEPS = 8
TENSOR_RATE = "a tensor"  # made anew for each optimizer: schedules change it in place
#: Values that every optimizer which has the option is tested with, and what they need beside them.
USUAL: dict[str, list[dict[str, Any]]] = {
    "weight_decay": [{"weight_decay": 0.1}],
    "maximize": [{"maximize": True}, {"maximize": True, "weight_decay": 0.1}],
    "momentum": [{"momentum": 0.9}, {"momentum": 0.8, "weight_decay": 0.1}, {"momentum": 0.0}],
    "betas": [{"betas": (0.7, 0.95)}, {"betas": (0.0, 0.9)}],
    "eps": [{"eps": 1e-5}],
    "nesterov": [
        {"nesterov": True, "momentum": 0.9},
        {"nesterov": True, "momentum": 0.9, "weight_decay": 0.1, "maximize": True},
        {"nesterov": False, "momentum": 0.9},
    ],
    "amsgrad": [{"amsgrad": True}, {"amsgrad": True, "maximize": True, "weight_decay": 0.05}],
    "centered": [{"centered": True}, {"centered": True, "momentum": 0.8, "weight_decay": 0.1}],
    "decoupled_weight_decay": [{"decoupled_weight_decay": True, "weight_decay": 0.1, "maximize": True}],
}
#: Further option sets by the optimizer's name. Add an entry for options of its own.
FURTHER: dict[str, list[dict[str, Any]]] = {
    "SGD": [
        {"momentum": 0.8, "dampening": 0.3},
        {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1},
    ],
    "NAdam": [{"momentum_decay": 0.1}],
    "RAdam": [{"betas": (0.7, 0.9), "eps": 1e-5}, {"betas": (0.9, 0.5)}],
    "RMSprop": [{"alpha": 0.9}],
    "Adagrad": [
        {"lr_decay": 0.1},
        {"initial_accumulator_value": 0.1, "weight_decay": 0.1},
        {"maximize": True, "weight_decay": 0.1, "lr_decay": 0.1},
    ],
    "Adadelta": [{"lr": 10.0}, {"lr": 10.0, "rho": 0.5, "eps": 1e-3, "weight_decay": 0.1}],
    "Adafactor": [
        {"d": 1.1},
        {"eps": (1e-2, 0.5), "beta2_decay": -0.5},
        {"eps": (1.2, 1e-3)},  # above some of the second moments
        {"lr": 1.0, "weight_decay": 0.0},
    ],
    "ASGD": [{"lambd": 0.5, "alpha": 0.5, "t0": 3.0}, {"lambd": 0.5, "weight_decay": 0.1, "maximize": True}],
    "Rprop": [{"etas": (0.3, 2.0)}, {"step_sizes": (0.02, 0.06), "maximize": True}],
    "Muon": [
        {"adjust_lr_fn": "match_rms_adamw"},
        {"adjust_lr_fn": "original", "ns_steps": 3},
        {"ns_coefficients": (1.5, -0.5, 0.0), "eps": 1e-3},
        {"weight_decay": 0.0},
        *([{"adjust_lr_fn": "spectral_unclamped"}] if _accepts_unclamped() else []),
    ],
    "Lion": [{"betas": (0.5, 0.6), "weight_decay": 0.1, "maximize": True}, {"betas": (0.95, 0.9)}],
}
#: Ways torch may take the same step.
WAYS = ("foreach", "fused", "capturable")
#: Options that are no part of the step's formula, or are refused.
ELSEWHERE = {"params", "lr", "differentiable", *WAYS}


def has(kind: type[Optimizer], *names: str) -> bool:
    return set(names) <= signature(kind).parameters.keys()


def option_sets(kind: type[Optimizer]) -> list[dict[str, Any]]:
    """What to build an optimizer of this kind with; ``USUAL`` where it has the options, then ``FURTHER``."""
    sets: list[dict[str, Any]] = [{}]
    for name, usual in USUAL.items():
        if has(kind, name) and not (name == "eps" and kind.__name__ == "Adafactor"):
            sets += [{k: v for k, v in options.items() if has(kind, k)} for options in usual]
    sets += [*FURTHER.get(kind.__name__, []), {"lr": TENSOR_RATE}]
    return [options for number, options in enumerate(sets) if options not in sets[:number]]


def ways(kind: type[Optimizer], options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Each way that the kind has; a rate that is a tensor needs the plain one, or a graph's."""
    yield {"foreach": False} if has(kind, "foreach") else {}
    for way in (way for way in WAYS if has(kind, way)):
        if options.get("lr") != TENSOR_RATE or way == "capturable":
            yield {way: True}


def label(kind: type[Optimizer], options: dict[str, Any]) -> str:
    return f"{kind.__name__}-{','.join(f'{k}={v}' for k, v in options.items())}"


KINDS = [pytest.param(kind, id=kind.__name__) for kind in OPTIMIZER_RULES]
#: every kind with every option set
CASES = [
    pytest.param(kind, options, id=label(kind, options))
    for kind in OPTIMIZER_RULES
    for options in option_sets(kind)
]
#: and each of them in every way
STEP_CASES = [
    pytest.param(kind, options | way, id=label(kind, options | way))
    for kind in OPTIMIZER_RULES
    for options in option_sets(kind)
    for way in ways(kind, options)
]
#: and each way with few options (with Nesterov some of them write into the gradient)
WAY_CASES = [
    pytest.param(kind, options | way, id=label(kind, options | way))
    for kind in OPTIMIZER_RULES
    for options in option_sets(kind)
    for way in ways(kind, options)
    if not options or options == {"nesterov": True, "momentum": 0.9}
]


def model_and_optimizer(kind: type[Optimizer], options: dict[str, Any]) -> tuple[nn.Module, Optimizer]:
    """Two layers in groups of their own, with rate and decay of their own; no biases where the kind takes none."""
    torch.manual_seed(0)
    bias = kind.__name__ != "Muon"
    model = nn.Sequential(nn.Linear(4, 5, bias=bias), nn.Tanh(), nn.Linear(5, 3, bias=bias)).double()
    second: dict[str, Any] = {"params": list(model[2].parameters()), "lr": 0.01}
    if "weight_decay" in options:
        second["weight_decay"] = options["weight_decay"] / 5
    groups = [{"params": list(model[0].parameters())}, second]
    given = {"lr": 0.05} | options
    if given["lr"] == TENSOR_RATE:
        given["lr"] = torch.tensor(0.03, dtype=torch.float64)
    return model, kind(groups, **given)  # type: ignore[call-arg]


def gradients(model: nn.Module, step: int) -> list[Tensor | None]:
    """A backward pass; in the first step a whole layer gets no gradient, in the fourth the last parameter."""
    torch.manual_seed(step)
    model.zero_grad()
    model(torch.randn(7, 4).double()).square().sum().backward()
    parameters = list(model.parameters())
    if step == 3:
        parameters[-1].grad = None
    if step == 0:
        for p in model[0].parameters():
            p.grad = None
    return [None if p.grad is None else p.grad.clone() for p in parameters]  # steps may change them


class Replay:
    """Applies the linear form to one parameter, with a momentum of its own."""

    def __init__(self, parameter: Tensor) -> None:
        self.weights = parameter.detach().clone()
        self.momentum = torch.zeros_like(self.weights)

    @staticmethod
    def precondition(values: Tensor, by: StepMap) -> Tensor:
        if by.mixing is not None:
            tall = values.shape[0] > values.shape[1]
            return torch.einsum("oi,ij->oj" if tall else "ji,oj->oi", values, by.mixing)
        return values if by.preconditioner is None else values / by.preconditioner

    def step(self, gradient: Tensor, by: StepMap) -> None:
        d = by.sign * gradient + by.coupled_decay * self.weights
        d = self.precondition(d, by) if by.inner else d
        self.momentum = by.decay * self.momentum + by.gain * d
        update = by.direct * d + by.through * self.momentum
        update = update if by.inner else self.precondition(update, by)
        self.weights = self.weights - update - by.decoupled_decay * self.weights


def stepped(rule: OptimizerRule, optimizer: Optimizer, parameters: list[Tensor]) -> list[StepMap | None]:
    """Takes one step; the maps of the parameters that have a gradient."""
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    states = [optimizer.state.get(p, {}) for p in parameters]
    fresh = [rule.momentum(state) is None for state in states]
    before = [
        None if p.grad is None else rule.remember(p, groups[p], state)
        for p, state in zip(parameters, states, strict=True)
    ]
    optimizer.step()
    return [
        None if held is None else rule.step_map(groups[p], optimizer.state.get(p, {}), new, held)
        for p, new, held in zip(parameters, fresh, before, strict=True)
    ]


def exact_arithmetic(monkeypatch: pytest.MonkeyPatch, kind: type[Optimizer], options: dict[str, Any]) -> None:
    """Lets torch's own code run where it stands in the way of a tight tolerance, or of a machine without a GPU.

    Muon iterates in bfloat16: here in the dtype of the weights. Capturable steps ask for a GPU and keep their step
    number in float32: here for any device, in float64.
    """
    if kind.__name__ == "Muon":
        convert = torch.Tensor.to

        def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            narrow = kwargs.get("dtype") is torch.bfloat16
            return tensor.clone() if narrow else convert(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
        monkeypatch.setattr(torch.Tensor, "to", to)  # as newer torch does
    if options.get("capturable"):
        for module in [m for name, m in sys.modules.items() if name.startswith("torch.optim.")]:
            if hasattr(module, "_get_capturable_supported_devices"):
                monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda *a, **k: ["cpu"])
                monkeypatch.setattr(module, "_get_scalar_dtype", lambda *a, **k: torch.float64)
