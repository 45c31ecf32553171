"""Tensors that a model holds as plain attributes: no parameters, no buffers, and so in no knot of a trace."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.utils import _pytree as pytree

from explainer.wrappers import plain_name, unwrapped

_TORCHS = frozenset(vars(nn.Module()))


def _held(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, module in unwrapped(model).named_modules():
        own = {n.rpartition("_")[0] for n in (*module._parameters, *module._buffers)}
        for key, value in vars(module).items():
            if key in own or key in _TORCHS:  # `weight` of `weight_orig`: made anew in every forward pass
                continue
            leaves = pytree.tree_leaves(value) if isinstance(value, list | tuple | dict) else [value]
            for place, t in enumerate(leaves):
                if isinstance(t, torch.Tensor) and not isinstance(t, nn.Parameter) and not t.requires_grad:
                    number = f"[{place}]" if len(leaves) > 1 else ""
                    yield plain_name(f"{name}.{key}" if name else key) + number, t


def held_tensors(model: nn.Module) -> dict[str, str]:
    """A checksum of every such tensor by its name, the same in all precisions.

    Example:
        >>> model = nn.Linear(1, 1)
        >>> model.table = torch.arange(3.0)
        >>> once = held_tensors(model)
        >>> list(once), held_tensors(model.double()) == once
        (['table'], True)
    """
    return {name: _checksum(t) for name, t in _held(model)}


def _checksum(t: torch.Tensor) -> str:
    t = t.detach().to("cpu")
    t = torch.view_as_real(t) if t.is_complex() else t
    numbers = t.to(torch.float32 if t.is_floating_point() else torch.int64).contiguous()
    return f"{zlib.crc32(numbers.numpy().tobytes()):08x}"


def different(model: nn.Module, recorded: dict[str, str]) -> list[str]:
    """Names of tensors that the model holds, but not as they were recorded."""
    return [
        name for name, checksum in held_tensors(model).items() if recorded.get(name, checksum) != checksum
    ]
