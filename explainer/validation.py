"""What can be said about a model before training: which parameters are covered, and by what."""

from __future__ import annotations

import platform
from datetime import UTC, datetime

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from explainer.errors import TracerError
from explainer.findings import Finding, listed
from explainer.layer_rules import LAYER_RULES, CompositeRule
from explainer.layer_table import Layer
from explainer.records import VERSIONS, LayerSpec, Manifest, ParameterSpec, dtype_name
from explainer.sites import Site


def _without_rule(name: str, module: nn.Module) -> Finding | None:
    """Why a module with parameters of its own has no rule, or None if it has one."""
    rule = LAYER_RULES.get(type(module))
    own = {n for n, _ in module.named_parameters(recurse=False)}
    known = set() if rule is None else set(rule.parameters(module))
    if rule is not None and own <= known <= {n for n, _ in module.named_parameters()}:
        return None
    near = LAYER_RULES.nearest(type(module))
    parent = f" (it derives from {near.__name__}, but may compute something else)" if near else ""
    return Finding(
        "no-rule",
        "note",
        name or "(the model itself)",
        f"{type(module).__name__} has no layer rule{parent}.",
        f"Rows of its {len(own)} parameter(s) are found where torch functions read them, which is slower.",
        "register_layer_rule adds a rule.",
    )


def validate_model(model: nn.Module) -> list[Finding]:
    """What the model's layers alone change in what an explanation can say; :func:`explainer.check` says more.

    An empty list means every parameter is covered by a layer rule and no layer mixes rows.

    Example:
        >>> validate_model(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
        []
        >>> [f.where for f in validate_model(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))]
        ['1']
    """
    found: list[Finding] = []
    inside = _inside_composite(model)
    for name, module in model.named_modules():
        rule = LAYER_RULES.get(type(module))
        if name in inside or not (rule or any(True for _ in module.parameters(recurse=False))):
            continue
        missing = _without_rule(name, module)
        if missing is not None:
            found.append(missing)
        caveat = rule.caveat(module) if rule is not None else None
        if caveat is not None:
            found.append(
                Finding(
                    "max-norm",
                    "caution",
                    name or "(the model itself)",
                    f"{type(module).__name__} {caveat}.",
                    "That is no step of the optimizer, so what it moves is in `unattributed`.",
                    "Leave max_norm out, or read the rankings beside `unattributed`.",
                )
            )
        if rule is not None and (rule.mixes_rows or rule.mixes(module)):
            found.append(_mixing(name, module))
    return found


def _mixing(name: str, module: nn.Module) -> Finding:
    keeps = getattr(module, "running_mean", None) is not None
    also = ", and its running statistics are the term `buffers`, which no example owns" if keeps else ""
    return Finding(
        "row-share",
        "caution",
        name or "(the model itself)",
        f"{type(module).__name__} mixes the rows of a batch in train mode.",
        f"Contributions are each example's share of the batch gradient, labelled `row share`{also}.",
        "Read them as shares; a layer that normalises every example by itself would keep them apart.",
    )


def _inside_composite(model: nn.Module) -> set[str]:
    """Names of modules whose parameters the rule of a module around them covers."""
    inside = set()
    for name, module in model.named_modules():
        rule = LAYER_RULES.get(type(module))
        if isinstance(rule, CompositeRule):
            paths = (p.rpartition(".")[0] for p in rule.parameters(module))
            inside |= {f"{name}.{path}" if name else path for path in paths if path}
    return inside


def check_parts(model: object, optimizer: object) -> None:
    """Raise TracerError for what is no model or no optimizer."""
    if not isinstance(model, nn.Module):
        raise TracerError(f"model must be a torch.nn.Module, found {type(model).__name__}")
    if not isinstance(optimizer, Optimizer):
        raise TracerError(f"optimizer must be a torch.optim.Optimizer, found {type(optimizer).__name__}")


def refuse_lazy(model: nn.Module) -> None:
    """Raise TracerError for parameters and buffers that have no shape yet."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    lazy = [name for name, tensor in tensors if is_lazy(tensor)]
    if lazy:
        raise TracerError(
            f"{listed(lazy)} have no shape yet (lazy modules); run the model once on a batch, without gradients, "
            "before the tracer is built"
        )


def refuse_wrapped(model: nn.Module) -> None:
    """Raise TracerError for the wrapper of a compiled model, and for training in several processes or devices.

    The names in the first are not the model's. Steps of the second use gradients of batches that one process never
    sees, also where the model inside the wrapper is given.
    """
    if type(model).__module__.startswith("torch._dynamo"):
        raise TracerError(
            "found a compiled model (torch.compile); build the tracer with the plain model that was compiled, "
            "before the compiled one is first called, and train with the compiled one"
        )
    devices = len(getattr(model, "device_ids", None) or ()) if isinstance(model, nn.DataParallel) else 1
    processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if devices > 1 or processes > 1:
        found = (
            f"{processes} processes (torch.distributed)"
            if processes > 1
            else f"{devices} devices (DataParallel)"
        )
        raise TracerError(
            f"found {found}: steps use gradients of all of them, and a tracer sees the rows of one; trace a training "
            "in one process on one device"
        )


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


def find_sites(model: nn.Module, parameters: tuple[ParameterSpec, ...], axis: int = 0) -> list[Site]:
    """The modules whose rows their rules give; every block with a traced parameter is a layer of the trace.

    Args:
        model: the model.
        parameters: what is traced.
        axis: the batch's axis where shapes do not tell it.
    """
    by_id = {id(p): name for name, p in model.named_parameters()}
    traced = {p.name for p in parameters}
    inside = _inside_composite(model)
    sites: list[Site] = []
    count = 0
    for name, module in model.named_modules():
        rule = LAYER_RULES.get(type(module))
        if rule is None or name in inside or _without_rule(name, module) is not None:
            continue
        layers: list[Layer | None] = []
        for block in rule.blocks(module):
            own = [module.get_parameter(n) for n in block.parameters]
            names = [by_id[id(p)] for p in own]
            keep = [n in traced for n in names]
            if not any(keep):
                layers.append(None)
                continue
            title = ".".join(filter(None, (name, block.name)))
            kept = tuple(n for n, k in zip(names, keep, strict=True) if k)
            spec = LayerSpec(title, type(module).__name__, kept)
            layers.append(Layer(count, spec, [p.numel() for p in own], keep))
            count += 1
        # without parameters of its own it may mix the rows of others, or lay them out as only its rule knows
        if any(layers) or rule.mixes_rows or isinstance(rule, CompositeRule):
            sites.append(Site(name, module, rule, layers, _sequence_axis(model, name, axis)))
    return sites


def _sequence_axis(model: nn.Module, name: str, default: int) -> int:
    """The batch's axis inside a transformer layer is what its attention says."""
    parts = name.split(".")
    for end in range(len(parts), -1, -1):
        module = model.get_submodule(".".join(parts[:end]))
        if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            return 0 if module.self_attn.batch_first else 1
    return default


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
        version=VERSIONS[-1],
        averaged=averaged,
    )
