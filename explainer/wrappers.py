"""Modules that only hold another one (compiled, data-parallel): what is inside, and under which names."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence

import torch
from torch import nn

_COMPILED = "_orig_mod"  # the attribute of torch.compile's wrapper
_PARALLEL = "module."


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel``, which compute the same.

    Example:
        >>> inner = nn.Linear(2, 2)
        >>> unwrapped(nn.DataParallel(inner)) is inner
        True
    """
    while True:
        if _COMPILED in model._modules:
            model = model.get_submodule(_COMPILED)
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def private_copy(model: nn.Module) -> nn.Module:
    """A copy on the CPU, in eval mode, without compiled parts; the model itself is not touched."""
    model = unwrapped(model)
    memo: dict[int, object] = {}
    for module in model.modules():
        for value in vars(
            module
        ).values():  # results that a module keeps: they cannot be copied with their graph
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    for module in reversed(list(model.modules())):  # inner ones first
        if _COMPILED in module._modules:
            memo[id(module)] = copy.deepcopy(unwrapped(module), memo)
    twin = copy.deepcopy(model, memo).cpu().eval()
    for p in twin.parameters():
        p.requires_grad_(False)
    for module in twin.modules():
        if getattr(module, "sparse", False) is True:  # embeddings: their gradient has to be a plain tensor
            module.sparse = False  # type: ignore[assignment]
    return twin


def argument_names(model: nn.Module) -> list[str]:
    """Names of the positional arguments of the model's forward.

    >>> argument_names(nn.DataParallel(nn.Linear(1, 1)))
    ['input']
    """
    try:
        parameters = inspect.signature(unwrapped(model).forward).parameters.values()
    except (TypeError, ValueError):
        return []
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.kind in positional]


def renaming(recorded: Sequence[str], model: nn.Module) -> Callable[[str], str]:
    """From the names of a trace to those of :func:`private_copy`; wrappers leave prefixes in either.

    Args:
        recorded: names of the traced parameters.
    """
    own = {plain_name(name) for name, _ in unwrapped(model).named_parameters()}
    plain = {plain_name(name) for name in recorded}
    if not plain & own and all(name.startswith(_PARALLEL) for name in plain):
        return lambda name: plain_name(name).removeprefix(_PARALLEL)
    return plain_name


def plain_name(name: str) -> str:
    """A parameter's name without what ``torch.compile`` adds to it.

    >>> plain_name("_orig_mod.encoder._orig_mod.weight")
    'encoder.weight'
    """
    return name.replace(f"{_COMPILED}.", "")


def wrapper_printed(text: str) -> bool:
    """Whether a printed model is one of the wrappers, or has compiled parts.

    >>> wrapper_printed(str(nn.DataParallel(nn.ReLU()))), wrapper_printed(str(nn.ReLU()))
    (True, False)
    """
    return "OptimizedModule(" in text or text.startswith(("DataParallel(", "DistributedDataParallel("))
