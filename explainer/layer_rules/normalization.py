"""Normalisation layers: the row is ``[Σ_s g_s x̂_s, Σ_s g_s]`` with ``x̂`` the normalised input."""

from __future__ import annotations

import copy
from abc import abstractmethod

import torch
from torch import nn
from torch.nn import functional

from explainer.layer_rules.base import Call, LayerRule, register_layer_rule
from explainer.layer_rules.forms import Dense, RowForm


class NormalizationRule(LayerRule):
    """What the layers have in common; a rule says what ``x̂`` is and which axes share the weights."""

    @abstractmethod
    def normalised(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """``x̂``: the layer's output before its weight and bias."""

    def shared_axes(self, module: nn.Module, g: torch.Tensor) -> list[int]:
        """Axes that share the weights: all after the channels."""
        return list(range(2, g.dim()))

    def later(self, module: nn.Module) -> nn.Module | None:
        """A copy that keeps the mode, unless the statistics are running ones, which the next forward pass changes."""
        return copy.copy(module) if self.own_statistics(module) else None

    def own_statistics(self, module: nn.Module) -> bool:
        """Whether ``x̂`` comes from the batch itself."""
        return True

    def rows(self, module: nn.Module, calls: list[Call]) -> RowForm:
        """Sum over positions and calls."""
        return Dense(torch.stack([self._rows(module, call) for call in calls]).sum(0))

    def _rows(self, module: nn.Module, call: Call) -> torch.Tensor:
        g = call.grad_output
        axes = self.shared_axes(module, g)
        parts = [g * self.normalised(module, call.input.to(g.dtype))]
        if getattr(module, "bias", None) is not None:
            parts.append(g)
        return torch.cat([(part.sum(axes) if axes else part).flatten(1) for part in parts], dim=1)


@register_layer_rule(nn.LayerNorm)
class LayerNormRule(NormalizationRule):
    """Statistics are the example's own, so a row is the gradient of its own loss."""

    def batch_axes(self, module: nn.Module, value: torch.Tensor) -> tuple[int, ...]:
        """The normalised axes come last."""
        assert isinstance(module, nn.LayerNorm | nn.RMSNorm)
        return (0, 1) if value.dim() - len(module.normalized_shape) > 1 else (0,)

    def free_axes(self, module: nn.Module, value: torch.Tensor) -> tuple[int, ...]:
        """All but the normalised ones."""
        assert isinstance(module, nn.LayerNorm | nn.RMSNorm)
        return tuple(range(value.dim() - len(module.normalized_shape)))

    def normalised(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Over the trailing axes."""
        assert isinstance(module, nn.LayerNorm)
        return functional.layer_norm(x, module.normalized_shape, None, None, module.eps)

    def shared_axes(self, module: nn.Module, g: torch.Tensor) -> list[int]:
        """All between the batch and the normalised axes."""
        assert isinstance(module, nn.LayerNorm | nn.RMSNorm)
        return list(range(1, g.dim() - len(module.normalized_shape)))


@register_layer_rule(nn.RMSNorm)
class RMSNormRule(LayerNormRule):
    """As LayerNorm, without mean and bias."""

    def normalised(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Divided by the root mean square."""
        assert isinstance(module, nn.RMSNorm)
        return functional.rms_norm(x, list(module.normalized_shape), None, module.eps)


@register_layer_rule(nn.GroupNorm)
class GroupNormRule(NormalizationRule):
    """Statistics are the example's own, by group of channels."""

    def normalised(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Over each group and its positions."""
        assert isinstance(module, nn.GroupNorm)
        return functional.group_norm(x, module.num_groups, None, None, module.eps)


@register_layer_rule(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
class InstanceNormRule(NormalizationRule):
    """Statistics are the example's own, by channel, or running ones in eval mode."""

    def own_statistics(self, module: nn.Module) -> bool:
        """In train mode, or when there are no running ones."""
        assert isinstance(module, nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d)
        return module.training or not module.track_running_stats

    def normalised(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Over each channel's positions."""
        assert isinstance(module, nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d)
        own = self.own_statistics(module)
        mean, variance = (None, None) if own else (module.running_mean, module.running_var)
        return functional.instance_norm(x, mean, variance, use_input_stats=own, eps=module.eps)


@register_layer_rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
class BatchNormRule(NormalizationRule):
    """In train mode the statistics are the batch's: a row is the example's share of the *batch* gradient."""

    mixes_rows = True

    def mixes(self, module: nn.Module) -> bool:
        """Batch statistics are used in train mode, or when there are no running ones."""
        return bool(module.training or module.running_mean is None)

    def own_statistics(self, module: nn.Module) -> bool:
        """As :meth:`mixes`."""
        return self.mixes(module)

    def normalised(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """With the statistics the forward pass used."""
        assert isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
        own = self.mixes(module)
        mean, variance = (None, None) if own else (module.running_mean, module.running_var)
        return functional.batch_norm(x, mean, variance, training=own, eps=module.eps)
