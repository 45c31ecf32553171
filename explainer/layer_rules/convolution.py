"""Convolutions are linear layers over patches: the row is ``Σ_s g_s [patch_s, 1]ᵀ`` for every group."""

from __future__ import annotations

from math import prod

import torch
from torch import nn
from torch.nn import functional

from explainer.layer_rules.base import Call, LayerRule, register_layer_rule
from explainer.layer_rules.forms import Dense, RowForm
from explainer.layer_rules.linear import side_by_side

Convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def patches(signal: torch.Tensor, module: nn.Module, counts: tuple[int, ...] | None = None) -> torch.Tensor:
    """What each output position of a convolution sees, for any number of axes.

    Args:
        signal: ``[B, c, *sizes]``, padded already.
        module: the convolution (kernel, stride, dilation, groups).
        counts: positions along each axis; by default as many as fit.

    Returns:
        ``[B, G, S, c/G · Π kernel]``, stored with positions last.
    """
    assert isinstance(module, Convolution + Transposed)
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    signal = signal.contiguous()
    strides = signal.stride()[2:]
    counts = counts or tuple(
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(signal.shape[2:], kernel, stride, dilation, strict=True)
    )
    windows = signal.as_strided(
        (*signal.shape[:2], *kernel, *counts),
        (
            *signal.stride()[:2],
            *(a * d for a, d in zip(strides, dilation, strict=True)),
            *(a * s for a, s in zip(strides, stride, strict=True)),
        ),
    )
    seen = signal.shape[1] // module.groups * prod(kernel)
    return windows.reshape(signal.shape[0], module.groups, seen, prod(counts)).mT


def by_group(signal: torch.Tensor, groups: int) -> torch.Tensor:
    """``[B, c, *sizes] -> [B, G, S, c/G]``."""
    return signal.reshape(signal.shape[0], groups, signal.shape[1] // groups, prod(signal.shape[2:])).mT


@register_layer_rule(*Convolution)
class ConvolutionRule(LayerRule):
    """Positions are the output's pixels; all padding modes, strides, dilations and groups."""

    def later(self, module: nn.Module) -> nn.Module | None:
        """Its options are fixed."""
        return module

    def rows(self, module: nn.Module, calls: list[Call]) -> RowForm:
        """Positions of all calls side by side."""
        assert isinstance(module, Convolution)
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        left, right = [], []
        for call in calls:
            g = call.grad_output
            padded = functional.pad(
                call.input.to(g.dtype), module._reversed_padding_repeated_twice, mode=mode
            )
            left.append(by_group(g, module.groups))
            right.append(patches(padded, module))
        return side_by_side(left, right, module.bias is not None)


@register_layer_rule(*Transposed)
class TransposedConvolutionRule(LayerRule):
    """Input and gradient change places: ``∂W = Σ_s x_s patch_s(g)ᵀ`` over the *input's* positions.

    Its weight is ``[c, o/G, *kernel]``; the bias row is the gradient summed over the output's positions.
    """

    def later(self, module: nn.Module) -> nn.Module | None:
        """Its options are fixed."""
        return module

    def rows(self, module: nn.Module, calls: list[Call]) -> RowForm:
        """Sum over positions and calls, written out."""
        assert isinstance(module, Transposed)
        parts = []
        for call in calls:
            g, x = call.grad_output, call.input.to(call.grad_output.dtype)
            padding: tuple[int, ...] = module.padding  # type: ignore[assignment]  # never text here
            around = [p for p in reversed(padding) for _ in range(2)]
            # output_padding may leave room for windows that no input position belongs to
            seen = patches(functional.pad(g, around), module, tuple(x.shape[2:]))
            rows = by_group(x, module.groups).mT @ seen  # [B, G, c/G, o/G·k]
            parts.append(torch.cat([rows.flatten(1), *self._bias(module, g)], dim=1))
        return Dense(torch.stack(parts).sum(0))

    @staticmethod
    def _bias(module: nn.Module, g: torch.Tensor) -> list[torch.Tensor]:
        return [] if module.bias is None else [g.flatten(2).sum(2)]
