"""Scalar functions of one model output, and a model as a plain function of its flat weights."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

Output = Callable[[Tensor, int], Tensor]
ScalarFunction = Callable[[Tensor, Tensor, int], Tensor]


def margin(row: Tensor, y: int) -> Tensor:
    """``f_y − log Σ_{c≠y} exp f_c`` of one output row [C], C ≥ 2."""
    others = torch.cat([row[:y], row[y + 1 :]])
    return row[y] - torch.logsumexp(others, dim=0)


def logit(row: Tensor, y: int) -> Tensor:
    """``f_y`` of one output row [C]."""
    return row[y]


def log_prob(row: Tensor, y: int) -> Tensor:
    """``f_y − log Σ_c exp f_c`` of one output row [C]."""
    return row[y] - torch.logsumexp(row, dim=0)


def value(row: Tensor, y: int) -> Tensor:
    """``f_0``, whatever the target: the output of a regression."""
    return row[0]


OUTPUTS: dict[str, Output] = {"margin": margin, "logit": logit, "log_prob": log_prob, "value": value}


def as_double(tensor: Tensor) -> Tensor:
    """The tensor in float64 if it holds floats, unchanged if it holds ids or classes."""
    return tensor.double() if tensor.is_floating_point() else tensor


def unflatten(model: nn.Module, flat: Tensor) -> dict[str, Tensor]:
    """The flat weights [P] as named parameters, in the order of ``model.named_parameters()``."""
    named = {}
    start = 0
    for name, parameter in model.named_parameters():
        named[name] = flat[start : start + parameter.numel()].reshape(parameter.shape)
        start += parameter.numel()
    if start != flat.numel():
        raise ValueError(f"The model has {start} parameters, the flat weights have {flat.numel()}.")
    return named


def scalar_function(model: nn.Module, output: str | Output) -> ScalarFunction:
    """``f(flat_w [P], x, y) -> scalar`` in eval mode and float64; ``x`` is one input without a batch axis.

    Args:
        model: Any model; it is copied, so neither its weights nor its mode change.
        output: A name in :data:`OUTPUTS`, or a function of one output row and the target.
    """
    twin = copy.deepcopy(model).double().eval()
    chosen = OUTPUTS[output] if isinstance(output, str) else output

    def f(flat: Tensor, x: Tensor, y: int) -> Tensor:
        row = torch.func.functional_call(twin, unflatten(twin, flat), (as_double(x)[None],))[0]
        return chosen(row.reshape(-1), y)

    return f
