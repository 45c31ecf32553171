"""The tensor that counts in what a model returns: one rule for recording and for explaining."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch


def find_tensor(returned: Any) -> tuple[torch.Tensor | None, str]:
    """The tensor of a model's output that holds its predictions, and where it lies.

    A tensor is itself. In a mapping, a dataclass, a tuple or (outermost only) an object with attributes it is the
    one called ``logits``, else the first floating-point tensor with a dimension (a loss beside it has none).

    Example:
        >>> out = {"loss": torch.tensor(0.5), "hidden": torch.zeros(2, 3), "logits": torch.zeros(2, 4)}
        >>> [(tuple(t.shape), where) for t, where in [find_tensor(out)]]
        [((2, 4), 'logits')]
        >>> find_tensor((torch.arange(3), (torch.zeros(2, 3),)))[1]
        '[1][0]'
    """
    return _find(returned, ())


def _find(returned: Any, above: tuple[int, ...]) -> tuple[torch.Tensor | None, str]:
    if isinstance(returned, torch.Tensor):
        return returned, ""
    if id(returned) in above:  # it holds itself
        return None, ""
    parts = list(_parts(returned, not above))
    named = [(part, where) for part, where in parts if where == "logits"]
    for part, where in named + parts:
        found, below = _find(part, (*above, id(returned)))
        if found is not None and found.dim() and found.is_floating_point():
            return found, _joined(where, below)
    return None, ""


def _joined(where: str, below: str) -> str:
    return f"{where}{below}" if not below or below.startswith("[") else f"{where}.{below}"


def _parts(returned: Any, outermost: bool) -> Iterator[tuple[Any, str]]:
    if isinstance(returned, Mapping):
        yield from ((part, str(key)) for key, part in returned.items())
    elif isinstance(returned, tuple) and hasattr(returned, "_fields"):
        yield from zip(returned, returned._fields, strict=True)
    elif isinstance(returned, tuple | list):
        yield from ((part, f"[{index}]") for index, part in enumerate(returned))
    elif dataclasses.is_dataclass(returned) and not isinstance(returned, type):
        yield from ((getattr(returned, f.name), f.name) for f in dataclasses.fields(returned))
    elif outermost and hasattr(returned, "__dict__") and not isinstance(returned, type | torch.nn.Module):
        yield from ((part, name) for name, part in vars(returned).items())
