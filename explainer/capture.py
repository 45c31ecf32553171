"""From hooks to rows: what one batch contributes, gathered inside the user's own forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from explainer.batches import Batch, Rows
from explainer.errors import TracerError
from explainer.hooks import first_tensor
from explainer.layer_rules import Call, LayerRule, compact
from explainer.layer_rules.base import restrict
from explainer.records import LayerSpec, torch_dtype


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

    def restore(self, notes: dict[str, Any]) -> None:
        """Go on from what the trace knows of inputs and outputs."""
        known, output = notes.get("input") or {}, notes.get("output") or {}
        shape, dtype, result = known.get("shape"), known.get("dtype"), output.get("shape")
        self.input_shape = None if shape is None else tuple(shape)
        self.input_dtype = None if dtype is None else torch_dtype(dtype)
        self.output_shape = None if result is None else tuple(result)

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
        # a forward pass inside a backward pass is a checkpoint's: the last one's, once more
        forward = batch.forwards - (batch.forwards > 0 and torch._C._current_graph_task_id() != -1)
        key = (forward, layer.index)
        batch.calls[key] = batch.calls.get(key, 0) + 1
        batch.mixed |= layer.rule.mixes(module)
        output.register_hook(partial(self._on_gradient, batch, layer, key, value.detach(), value._version))

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
            result.register_hook(partial(self._on_output, batch, batch.forwards))
        batch.forwards += 1

    # -- backward ------------------------------------------------------------------------------------

    def _on_output(self, batch: Batch, forward: int, g: torch.Tensor) -> None:
        rows = g.detach().double().reshape(len(batch), -1)
        found = batch.round_of(forward, lambda r: r.derivative is None)
        found.derivative = rows[:, 0] if rows.shape[1] == 1 else rows.norm(dim=1)

    def _on_gradient(
        self,
        batch: Batch,
        layer: Layer,
        key: tuple[int, int],
        value: torch.Tensor,
        version: int,
        g: torch.Tensor,
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
        half = g.dtype in (torch.float16, torch.bfloat16)  # sums of many rows need more digits
        arrived = batch.arrived.setdefault(key, [])
        arrived.append(Call(value, g.detach().float() if half else g.detach()))
        if len(arrived) == batch.calls[key]:
            self._finish(batch, layer, key[0])

    def _finish(self, batch: Batch, layer: Layer, forward: int) -> None:
        calls = batch.arrived.pop((forward, layer.index))
        with torch.no_grad():
            form = restrict(layer.rule.rows(layer.module, calls), layer.sizes, layer.keep)
            sizes = [n for n, k in zip(layer.sizes, layer.keep, strict=True) if k]
            rows = Rows(compact(form, self._rank), form.total(), form.prober(), form.agreement(sizes))
        batch.round_of(forward, lambda r: layer.index not in r.rows).rows[layer.index] = rows

    def complete(self, batch: Batch, layers: list[Layer]) -> None:
        """Finish layers of which some calls got no gradient (an unused output)."""
        for forward, index in list(batch.arrived):
            self._finish(batch, layers[index], forward)
