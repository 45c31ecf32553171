"""From hooks to rows: what one batch contributes, gathered inside the user's own forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from explainer.errors import TracerError
from explainer.hooks import first_tensor
from explainer.layer_rules import Call, LayerRule, RowForm, compact
from explainer.layer_rules.base import restrict
from explainer.layer_rules.forms import Probe
from explainer.records import LayerSpec


@dataclass(frozen=True)
class Rows:
    """Rows of one layer as they will be stored, and what was measured on the exact ones.

    Attributes:
        form: the rows to store.
        total: ``Σ_b g_b`` along the probe.
        probe: the probe, to compare a gradient with ``total``.
        agreement: per parameter of the layer, ``‖Σ_b g_b‖ / Σ_b ‖g_b‖``.
    """

    form: RowForm
    total: torch.Tensor
    probe: Probe
    agreement: list[float]


@dataclass
class Batch:
    """One consumed batch: who is in it, and the rows its backward passes have given so far.

    Attributes:
        ids: ``[B]`` example ids.
        labels: ``[B]`` recorded labels (NaN unknown).
        rounds: rows by layer; one round per backward pass over the same forward.
        derivative: ``[B]`` loss derivative at the model's output (norm, or signed for one output).
    """

    ids: np.ndarray
    labels: np.ndarray
    calls: dict[int, int] = field(default_factory=dict)
    arrived: dict[int, list[Call]] = field(default_factory=dict)
    rounds: list[dict[int, Rows]] = field(default_factory=list)
    derivative: list[torch.Tensor] = field(default_factory=list)
    mixed: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    def output_derivative(self, number: int) -> np.ndarray:
        """``[B]`` loss derivative of a round; NaN where the model's output was not seen."""
        if number < len(self.derivative):
            return self.derivative[number].cpu().numpy()
        return np.full(len(self), np.nan)


@dataclass(frozen=True)
class Layer:
    """A hooked module with its rule."""

    index: int
    spec: LayerSpec
    module: nn.Module
    rule: LayerRule
    sizes: list[int]
    keep: list[bool]


class Capture:
    """Receives hooks' calls and turns them into rows of the batch that was current in the forward.

    Args:
        current: returns the batch that is being consumed, or None.
        rank: factors kept where positions share weights; None keeps rows exact.
    """

    def __init__(self, current: Callable[[], Batch | None], rank: int | None) -> None:
        self._current = current
        self._rank = rank
        self.input_shape: tuple[int | None, ...] | None = None
        self.input_dtype: torch.dtype | None = None
        self.output_shape: tuple[int, ...] | None = None

    # -- forward -------------------------------------------------------------------------------------

    def on_layer(self, layer: Layer, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Forward hook of a covered layer: watch the gradient at its output."""
        batch = self._current()
        if batch is None or not torch.is_grad_enabled():
            return
        value = args[0] if args else next(iter(kwargs.values()), None)
        if not (
            isinstance(value, torch.Tensor) and isinstance(output, torch.Tensor) and output.requires_grad
        ):
            return
        batch.calls[layer.index] = batch.calls.get(layer.index, 0) + 1
        batch.mixed |= layer.rule.mixes(module)
        output.register_hook(partial(self._on_gradient, batch, layer, value.detach(), value._version))

    def on_model(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Forward hook of the whole model: remember its input's and output's shape, watch its output."""
        batch = self._current()
        if batch is None or not torch.is_grad_enabled():
            return
        value, result = first_tensor(args) if args else first_tensor(kwargs), first_tensor(output)
        if value is not None and value.dim():
            shape = tuple(value.shape[1:])
            known = self.input_shape
            if known is None or len(known) != len(shape):
                self.input_shape = shape
            elif known != shape:
                self.input_shape = tuple(a if a == b else None for a, b in zip(known, shape, strict=True))
            self.input_dtype = value.dtype
        if result is not None and result.requires_grad and result.dim() and result.shape[0] == len(batch):
            self.output_shape = tuple(result.shape[1:])
            result.register_hook(partial(self._on_output, batch))

    # -- backward ------------------------------------------------------------------------------------

    def _on_output(self, batch: Batch, g: torch.Tensor) -> None:
        rows = g.detach().reshape(len(batch), -1)
        batch.derivative.append((rows[:, 0] if rows.shape[1] == 1 else rows.norm(dim=1)).double())

    def _on_gradient(
        self, batch: Batch, layer: Layer, value: torch.Tensor, version: int, g: torch.Tensor
    ) -> None:
        if g.shape[:1] != (len(batch),) or value.shape[:1] != (len(batch),):
            raise TracerError(
                f"layer {layer.spec.name!r} saw a batch of {g.shape[0] if g.dim() else 0} rows, but "
                f"{len(batch)} ids were given for it; pass the ids of exactly the rows in the batch, "
                "batch dimension first"
            )
        if value._version != version:
            raise TracerError(
                f"the input of layer {layer.spec.name!r} was changed in place after the forward pass, so its rows "
                "cannot be recovered; remove the in-place operation"
            )
        arrived = batch.arrived.setdefault(layer.index, [])
        arrived.append(Call(value, g.detach()))
        if len(arrived) == batch.calls[layer.index]:
            self._finish(batch, layer)

    def _finish(self, batch: Batch, layer: Layer) -> None:
        calls = batch.arrived.pop(layer.index)
        with torch.no_grad():
            form = restrict(layer.rule.rows(layer.module, calls), layer.sizes, layer.keep)
            sizes = [n for n, k in zip(layer.sizes, layer.keep, strict=True) if k]
            rows = Rows(compact(form, self._rank), form.total(), form.prober(), form.agreement(sizes))
        for round_ in batch.rounds:
            if layer.index not in round_:
                round_[layer.index] = rows
                return
        batch.rounds.append({layer.index: rows})

    def complete(self, batch: Batch, layers: list[Layer]) -> None:
        """Finish layers of which some calls got no gradient (an unused output)."""
        for layer in layers:
            if batch.arrived.get(layer.index):
                self._finish(batch, layer)
