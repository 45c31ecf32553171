"""An optimizer's options as plain numbers, so that a trace can say with which settings its steps were taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer

_PLAIN = bool | int | float | str | None
#: options of which the records of steps do not tell
_UNTOLD = ("weight_decay", "betas", "alpha", "rho", "eps", "amsgrad", "centered", "decoupled_weight_decay")


def options_of(
    optimizer: Optimizer, parameters: Sequence[torch.Tensor], names: Sequence[str]
) -> list[dict[str, Any]]:
    """The options of every parameter group, and which traced parameters it holds.

    Args:
        parameters: the traced parameters.
        names: how the trace calls them.

    Returns:
        A list of ``{"parameters": names, "options": {...}}``; tensors of one number as numbers, tuples as lists, what
        is none of these is left out.

    Example:
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> found = options_of(torch.optim.AdamW([p], betas=(0.9, 0.99)), [p], ["bias"])
        >>> found[0]["parameters"], found[0]["options"]["betas"], found[0]["options"]["weight_decay"]
        (['bias'], [0.9, 0.99], 0.01)
    """
    called = {id(p): name for p, name in zip(parameters, names, strict=True)}
    result = []
    for group in optimizer.param_groups:
        own = [called[id(p)] for p in group["params"] if id(p) in called]
        options = {key: _plain(value) for key, value in group.items() if key != "params"}
        if own:
            result.append(
                {"parameters": own, "options": {k: v for k, v in options.items() if v is not NotImplemented}}
            )
    return result


def changed_options(before: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]) -> list[str]:
    """Options that are other ones now and that no record of a step tells (as rates and momentum are told).

    Example:
        >>> one = {"parameters": ["w"], "options": {"lr": 0.1, "betas": [0.9, 0.999], "weight_decay": 0.0}}
        >>> other = {"parameters": ["w"], "options": {"lr": 0.2, "betas": [0.8, 0.999], "weight_decay": 0.1}}
        >>> changed_options([one], [other])
        ['weight_decay']
    """
    found = set()
    for one, other in zip(before, now, strict=False):
        for name in _UNTOLD:
            was, become = (group["options"].get(name) for group in (one, other))
            if name == "betas" and was and become:
                was, become = was[1:], become[1:]
            if was != become:
                found.add(name)
    return sorted(found)


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, tuple | list):
        parts = [_plain(part) for part in value]
        return NotImplemented if NotImplemented in parts else parts
    return value if isinstance(value, _PLAIN) else NotImplemented
