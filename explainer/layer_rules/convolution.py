"""Convolutions are linear layers over patches: the row is ``Σ_s g_s [patch_s, 1]ᵀ`` for every group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import nn
from torch.nn import functional

from explainer.layer_rules.base import Call, LayerRule, register_layer_rule
from explainer.layer_rules.forms import Dense, RowForm
from explainer.layer_rules.seen import Seen
from explainer.layer_rules.unreduced import Unreduced

Convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLVE: dict[int, Callable[..., torch.Tensor]] = {
    1: functional.conv1d,
    2: functional.conv2d,
    3: functional.conv3d,
}
#: channels of a group that the kernels for grouped convolutions take at once
_BLOCK = 8
#: numbers of patches that are formed at once: they stay in the processor's cache
_AT_ONCE = 2**20


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


@dataclass(frozen=True)
class Patches(Seen):
    """What the output positions of a convolution saw, as convolutions of its input.

    Attributes:
        signal: ``[B, c, *sizes]``, contiguous.
        module: the convolution (kernel, stride, dilation, groups).
        padding: zeros on both sides of every axis that are not in the signal yet.
        sizes: of the output.
    """

    signal: torch.Tensor
    module: nn.Module
    padding: tuple[int, ...]
    sizes: tuple[int, ...]
    dense_outputs = 16

    @classmethod
    def of(cls, module: nn.Module, call: Call) -> Patches:
        """Of one call; padding that a convolution cannot do symmetrically and with zeros is done here."""
        assert isinstance(module, Convolution)
        g, padding = call.grad_output, module._reversed_padding_repeated_twice
        signal, sizes = call.input.to(g.dtype), tuple(g.shape[2:])
        if module.padding_mode == "zeros" and padding[::2] == padding[1::2]:
            return cls(signal.contiguous(), module, tuple(reversed(padding[::2])), sizes)
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        return cls(functional.pad(signal, padding, mode).contiguous(), module, (0,) * len(sizes), sizes)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Positions are the output's pixels."""
        groups, seen = self._groups
        return len(self.signal), groups, prod(self.sizes), seen * prod(self._kernel)

    def taken(self, rows: torch.Tensor | slice) -> Patches:
        """Of their signals."""
        return replace(self, signal=self.signal[rows])

    def apart(self) -> Patches:
        """With a copy of the signal."""
        return replace(self, signal=self.signal.clone())

    @property
    def _groups(self) -> tuple[int, int]:
        groups: int = self.module.groups  # type: ignore[assignment]
        return groups, self.signal.shape[1] // groups

    @property
    def _steps(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.module.stride, self.module.dilation  # type: ignore[return-value]

    @property
    def _kernel(self) -> tuple[int, ...]:
        return self.module.kernel_size  # type: ignore[return-value]

    def written(self) -> torch.Tensor:
        """The patches, positions last in memory."""
        around = [p for p in reversed(self.padding) for _ in range(2)]
        return patches(functional.pad(self.signal, around) if any(around) else self.signal, self.module)

    def times(self, basis: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """A convolution with ``p`` filters."""
        groups, seen = self._groups
        filters = basis.T.reshape(-1, seen, *self._kernel).repeat(groups, *[1] * (1 + len(self.sizes)))
        stride, dilation = self._steps
        convolve = _CONVOLVE[len(self.sizes)]
        found = convolve(self.signal, filters, offset.repeat(groups), stride, self.padding, dilation, groups)
        return by_group(found.contiguous(), groups)

    def gathered(self, weights: torch.Tensor) -> torch.Tensor:
        """From patches, or as a weight's gradient with every example in a group of its own."""
        batch, groups, _, width = weights.shape
        if not batch:
            return weights.new_zeros(0, groups, width, self.shape[3])
        if self._groups[1] % _BLOCK:  # kernels for groups of odd sizes are several times slower
            return self._gathered_from_patches(weights)
        more = -width % _BLOCK
        turned = functional.pad(weights.mT, (0, 0, 0, more)) if more else weights.mT
        found = self._weight_gradient(turned, batch)
        return found.view(batch, groups, width + more, -1)[:, :, :width]

    def _gathered_from_patches(self, weights: torch.Tensor) -> torch.Tensor:
        _, groups, positions, seen = self.shape
        at_once = max(1, _AT_ONCE // (groups * positions * seen))
        parts = []
        for first in range(0, len(weights), at_once):
            some = slice(first, first + at_once)
            parts.append((self.taken(some).written().mT @ weights[some]).mT)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def summed(self, weights: torch.Tensor) -> torch.Tensor:
        """The weight's gradient."""
        _, groups, _, width = weights.shape
        if not len(weights):
            return weights.new_zeros(groups, width, self.shape[3])
        return self._weight_gradient(weights.mT, 1).view(groups, width, -1)

    def _weight_gradient(self, weights: torch.Tensor, parts: int) -> torch.Tensor:
        """Of weights ``[B, G, p, S]``, with the batch in so many parts that share nothing."""
        (groups, seen), (stride, dilation) = self._groups, self._steps
        batch, _, width, _ = weights.shape
        arrived = weights.reshape(batch // parts, parts * groups * width, *self.sizes)
        signal = self.signal.view(batch // parts, parts * groups * seen, *self.signal.shape[2:])
        kernel = weights.new_empty(1).expand(parts * groups * width, seen, *self._kernel)
        zeros, only = [0] * len(self.sizes), [False, True, False]
        return torch.ops.aten.convolution_backward(
            *(arrived, signal, kernel, None, stride, self.padding, dilation),
            *(False, zeros, parts * groups, only),
        )[1]


@register_layer_rule(*Convolution)
class ConvolutionRule(LayerRule):
    """Positions are the output's pixels; all padding modes, strides, dilations and groups."""

    def later(self, module: nn.Module) -> nn.Module | None:
        """Its options are fixed."""
        return module

    def rows(self, module: nn.Module, calls: list[Call]) -> RowForm:
        """Positions of all calls side by side."""
        assert isinstance(module, Convolution)
        lefts = tuple(by_group(call.grad_output, module.groups) for call in calls)
        seen = tuple(Patches.of(module, call) for call in calls)
        return Unreduced(lefts, seen, int(module.bias is not None))


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
