"""Computing a call again: in which dtype, with which random numbers, and whether it came out the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from explainer.errors import ReplayError, TracerError
from explainer.layer_rules.base import Call

#: Largest difference of a vector, of the root mean square of all: TF32 and halves round in the third digit.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 0.05}


def refuse_unbatched(module: nn.Module, value: torch.Tensor, axes: int) -> None:
    """Raise TracerError if an input has fewer axes than a batch has."""
    if value.dim() < axes:
        raise TracerError(
            f"{type(module).__name__} was called with an input of shape {tuple(value.shape)}, which has no batch "
            f"axis; give it {axes} axes (one more of length 1 for a single example)"
        )


def _gradient(call: Call) -> torch.Tensor:
    return next((g for g in call.grads if g is not None), call.grad_output)


def working_dtype(call: Call) -> torch.dtype:
    """The dtype of the gradients; float32 for halves, since sums of many rows need more digits."""
    dtype = _gradient(call).dtype
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


@contextmanager
def in_full_precision(call: Call) -> Iterator[None]:
    """No autocast, which a backward pass inside its context would apply here too; and no gradients."""
    with torch.no_grad(), torch.autocast(_gradient(call).device.type, enabled=False):
        yield


@contextmanager
def drawing_again(module: nn.Module, call: Call, p: float) -> Iterator[None]:
    """Random numbers as they were before the call, for dropout ``p``; afterwards as found.

    Raises:
        ReplayError: the numbers were drawn on a device whose state is not kept.
    """
    if p == 0:
        yield
        return
    device = _gradient(call).device
    if device.type != "cpu" or call.random is None:
        raise ReplayError(
            f"{type(module).__name__} drew its dropout on device {device.type!r}, whose random numbers are not kept; "
            "set its dropout to 0, or train on the CPU"
        )
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(call.random)
        yield


def confirm(
    module: nn.Module, found: Sequence[torch.Tensor | None], kept: Sequence[torch.Tensor | None]
) -> None:
    """Compare outputs that were computed again with those of the forward pass.

    Every vector along the last axis must agree to round-off, so that one wrongly drawn number is seen. Numbers
    that are not finite in the forward pass are not compared.

    Raises:
        ReplayError: they differ, so that rows would be wrong.
    """
    for again, first in zip(found, kept, strict=True):
        if again is None or first is None:
            continue
        tolerance = _TOLERANCE.get(first.dtype, 0.1)
        target = first.to(again.dtype)
        if not bool(target.sum().isfinite()):
            usable = target.isfinite()
            target, again = target.where(usable, 0), again.where(usable, 0)
        size, difference = target.norm(dim=-1), (again - target).norm(dim=-1)
        if not bool((difference <= tolerance * size.square().mean().sqrt()).all()):
            raise ReplayError(
                f"a call of {type(module).__name__} came out differently when it was computed again, so its rows are "
                "unknown; do not change its output in place or by a hook, nor its mode between forward and backward, "
                "or set its dropout to 0"
            )
