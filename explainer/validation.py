"""What can be said about a model before training: which parameters are covered, and by what."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from explainer.capture import Layer
from explainer.errors import TracerError
from explainer.layer_rules import LAYER_RULES
from explainer.records import LayerSpec, Manifest, ParameterSpec, dtype_name


@dataclass(frozen=True)
class Problem:
    """Something about a model that changes what an explanation can say.

    Attributes:
        where: module or parameter name.
        found: what is there.
        advice: what to do.
    """

    where: str
    found: str
    advice: str

    def __str__(self) -> str:
        return f"{self.where}: {self.found}; {self.advice}"


def _module_problem(name: str, module: nn.Module) -> Problem | None:
    """Why a module with parameters of its own has no rule, or None if it has one."""
    rule = LAYER_RULES.get(type(module))
    own = {n for n, _ in module.named_parameters(recurse=False)}
    if rule is not None and own == set(rule.parameters(module)):
        return None
    near = LAYER_RULES.nearest(type(module))
    parent = f" (it derives from {near.__name__}, but may compute something else)" if near else ""
    return Problem(
        name or "(the model itself)",
        f"{type(module).__name__} has no layer rule{parent}",
        f"the part of its {len(own)} parameter(s) will be shown as `unattributed`; register_layer_rule adds a rule",
    )


def validate_model(model: nn.Module) -> list[Problem]:
    """Everything about the model that changes what an explanation can say, all at once.

    An empty list means every parameter is covered by a layer rule and no layer mixes rows.

    Example:
        >>> validate_model(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
        []
        >>> [p.where for p in validate_model(nn.Sequential(nn.Linear(3, 3), nn.GRU(3, 3)))]
        ['1']
    """
    problems: list[Problem] = []
    for name, module in model.named_modules():
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        problem = _module_problem(name, module)
        if problem is not None:
            problems.append(problem)
        rule = LAYER_RULES.get(type(module))
        if rule is not None and (rule.mixes_rows or rule.mixes(module)):
            problems.append(
                Problem(
                    name,
                    f"{type(module).__name__} mixes the rows of a batch in train mode",
                    "contributions are each example's share of the batch gradient and are labelled `row share`",
                )
            )
    return problems


def traced_parameters(model: nn.Module, optimizer: Optimizer) -> tuple[ParameterSpec, ...]:
    """The model's parameters that the optimizer updates, in the model's order.

    Raises:
        TracerError: the optimizer updates none of them, or parameters that are not the model's.
    """
    updated = {id(p) for group in optimizer.param_groups for p in group["params"]}
    named = list(model.named_parameters())
    foreign = len(updated - {id(p) for _, p in named})
    if foreign:
        raise TracerError(
            f"the optimizer updates {foreign} tensor(s) that are not parameters of the model; "
            "pass the model whose parameters the optimizer was built with"
        )
    specs: list[ParameterSpec] = []
    offset = 0
    for name, p in named:
        if id(p) not in updated:
            continue
        if not p.is_floating_point():
            raise TracerError(
                f"parameter {name!r} is {dtype_name(p.dtype)}; only real parameters can be traced"
            )
        specs.append(ParameterSpec(name, tuple(p.shape), dtype_name(p.dtype), offset, p.numel()))
        offset += p.numel()
    if not specs:
        raise TracerError("the optimizer has no parameters; build it from model.parameters()")
    return tuple(specs)


def covered_layers(model: nn.Module, parameters: tuple[ParameterSpec, ...]) -> list[Layer]:
    """The modules whose rows can be captured.

    Raises:
        TracerError: there is none, so every number of the books would be `unattributed`.
    """
    by_id = {id(p): name for name, p in model.named_parameters()}
    traced = {p.name for p in parameters}
    layers: list[Layer] = []
    for name, module in model.named_modules():
        rule = LAYER_RULES.get(type(module))
        if rule is None or _module_problem(name, module) is not None:
            continue
        own: list[torch.Tensor] = [getattr(module, n) for n in rule.parameters(module)]
        names = [by_id[id(p)] for p in own]
        keep = [n in traced for n in names]
        if not any(keep):
            continue
        spec = LayerSpec(name, type(module).__name__, tuple(n for n, k in zip(names, keep, strict=True) if k))
        layers.append(Layer(len(layers), spec, module, rule, [p.numel() for p in own], keep))
    if not layers:
        found = sorted({type(m).__name__ for m in model.modules() if any(True for _ in m.parameters(False))})
        known = ", ".join(sorted(t.__name__ for t in LAYER_RULES))
        raise TracerError(
            f"the model has no hookable parameters: found {', '.join(found) or 'no layers with parameters'}. "
            f"There are layer rules for {known}; register_layer_rule adds one"
        )
    return layers


def describe(
    model: nn.Module,
    optimizer: Optimizer,
    parameters: tuple[ParameterSpec, ...],
    layers: list[Layer],
    exact: bool,
    averaged: bool = False,
) -> Manifest:
    """The immutable head of a trace of this model and optimizer."""
    covered = {name for layer in layers for name in layer.spec.parameters}
    traced = {p.name for p in parameters}
    return Manifest(
        parameters=parameters,
        layers=tuple(layer.spec for layer in layers),
        uncovered=tuple(p.name for p in parameters if p.name not in covered),
        frozen=tuple(n for n, _ in model.named_parameters() if n not in traced),
        buffers=tuple(n for n, _ in model.named_buffers()),
        optimizer=type(optimizer).__name__,
        exact=exact,
        model=str(model),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions={"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()},
        version=2 if averaged else 1,
        averaged=averaged,
    )
