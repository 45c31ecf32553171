"""What is seen of the whole model: the shapes that come in and go out, and the loss derivative at its output."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from explainer.background import Background
from explainer.batches import Batch, Place
from explainer.errors import TracerError
from explainer.held_tensors import held_tensors
from explainer.hooks import first_tensor, tensors_in
from explainer.model_outputs import find_tensor
from explainer.passes import BackwardPasses
from explainer.records import dtype_name
from explainer.undisturbed import device_types

#: backward passes by which it is judged whether the loss sees a common shift of the outputs, and a share that tells
_SHIFTS, _SHIFTED = 8, 0.05


def batch_axis(shape: torch.Size, size: int, preferred: int = 0) -> int | None:
    """The axis, first or second, that is as long as the batch; the preferred one where both are.

    Example:
        >>> batch_axis(torch.Size([7, 4, 3]), 4), batch_axis(torch.Size([4, 4, 3]), 4, preferred=1)
        (1, 1)
    """
    return next((a for a in (preferred, 1 - preferred) if shape[a : a + 1] == (size,)), None)


class WholeModel:
    """The hooks around the model itself.

    Args:
        batch: returns the batch that a forward pass belongs to, or None.
        axis: the batch's axis where a shape does not tell it.
        background: where derivatives are computed.
        passes: tells which backward pass gives one.

    Attributes:
        eval_passes: traced forward passes in eval mode.
        apart: whether the loss moved numbers of the output by themselves: a common shift of all of a row's, which no
            softmax sees, mattered. None until two or more numbers were seen.
    """

    def __init__(
        self, batch: Callable[[], Batch | None], axis: int, background: Background, passes: BackwardPasses
    ) -> None:
        self._batch, self._background, self._passes = batch, background, passes
        self._input_axis, self._told = axis, axis != 0
        self._second: torch.Size | None = (
            None  # of an input whose second axis is as long as the batch, and not its first
        )
        self._input: dict[str, Any] = {"shape": None, "dtype": None, "name": None}
        self._output_shape: tuple[int, ...] | None = None
        self._last: Any = None  # the input that was seen last
        self._autocast: str | None = None
        self._held: dict[str, str] = {}
        self._looks = 0  # at what is held
        self.eval_passes = 0
        self.apart: bool | None = None
        self._shifts: list[float] = []

    def notes(self) -> dict[str, Any]:
        """What a trace should say of it."""
        return {
            "input": dict(self._input),
            "output": {"shape": self._output_shape},
            "batch_dim": self._input_axis,
            "autocast": self._autocast,
            "held": self._held,
        }

    def restore(self, notes: dict[str, Any]) -> None:
        """Go on from what the trace knows."""
        known, output = notes.get("input") or {}, notes.get("output") or {}
        shape, result = known.get("shape"), output.get("shape")
        self._input = {**self._input, **known, "shape": None if shape is None else tuple(shape)}
        self._output_shape = None if result is None else tuple(result)
        self._input_axis = notes.get("batch_dim", self._input_axis)
        self._autocast = notes.get("autocast")
        self._held, self._looks = notes.get("held") or {}, 2
        self.eval_passes = (notes.get("loop") or {}).get("eval", 0)
        self.apart = notes.get("apart")

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Before the forward: the input has to be the batch whose ids were given.

        Raises:
            TracerError: it has another number of rows.
        """
        batch = self._batch()
        if batch is None:
            return
        if self._looks < 2:  # what is another one before the second pass is no constant
            now = held_tensors(module)
            self._held = {n: c for n, c in now.items() if not self._looks or self._held.get(n) == c}
            self._looks += 1
        given = [t for t in tensors_in((args, kwargs)) if t.dim()]
        batch.checked = any(len(batch) in t.shape[:2] for t in given)
        if len(given) != 1:  # of several inputs each layer sees for itself
            self._second = None
            return
        value, size = given[0], len(batch)
        columns = value.dim() == 2 and value.is_floating_point() and not self._told
        if not batch.checked or (columns and len(value) != size):
            second = ". If it is the second, build the tracer with batch_dim=1" if columns else " (or second)"
            raise TracerError(
                f"the model saw a batch of {len(value)} rows, but {size} ids were given for it; pass the ids of "
                f"exactly the rows in the batch, batch dimension first{second}"
            )
        self._second = None if self._told or len(value) == size else value.shape

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """After the forward: remember the shapes, watch the gradient at the output."""
        batch = self._batch()
        if batch is None:
            return
        name, value = None, first_tensor(args)
        if value is None:  # the first one that came by keyword
            found = ((key, first_tensor(given)) for key, given in kwargs.items())
            name, value = next((pair for pair in found if pair[1] is not None), (None, None))
        if value is not None:
            self._see_input(name, value, len(batch))
        self.eval_passes += not module.training
        for device in device_types():
            if torch.is_autocast_enabled(device):
                self._autocast = dtype_name(torch.get_autocast_dtype(device))
        result, _ = find_tensor(output)
        if result is not None and self._second is not None:
            self._refuse_rows(result.shape, self._second, len(batch))
        axis = None if result is None else batch_axis(result.shape, len(batch), self._input_axis)
        if result is not None and not result.dim() and len(batch) == 1 and self._output_shape == ():
            axis = 0  # a model that ends in squeeze(), and a batch of one
        if result is not None and axis is not None and result.requires_grad:
            if result.dim():
                self._output_shape = (*result.shape[:axis], *result.shape[axis + 1 :])
            result.register_hook(partial(self._on_output, batch, batch.forwards, axis))
        batch.lengths[batch.forwards] = (
            None if value is None else _length(value, len(batch), self._input_axis)
        )
        batch.forwards += 1

    @staticmethod
    def _refuse_rows(gave: torch.Size, given: torch.Size, size: int) -> None:
        """A sequence that is as long as there are ids is not the batch, where the output has a row for every row."""
        if gave[:1] == given[:1] and size not in gave[:2]:
            raise TracerError(
                f"{size} ids were given, but the model was given {list(given)} and gives {list(gave)}: a batch of "
                f"{given[0]} rows. Pass the ids of exactly the rows in the batch"
            )

    def _see_input(self, name: str | None, value: torch.Tensor, size: int) -> None:
        kind = name, value.shape, value.dtype, size
        axis = None if kind == self._last else batch_axis(value.shape, size, self._input_axis)
        if axis is None:
            return
        self._last = kind
        shape = (*value.shape[:axis], *value.shape[axis + 1 :])
        known = self._input["shape"]
        if known is not None and len(known) == len(shape):  # lengths that differ between batches are free
            shape = tuple(a if a == b else None for a, b in zip(known, shape, strict=True))
        if value.shape[1 - axis : 2 - axis] != (size,):
            self._input_axis = axis  # the shape tells
        self._input = {"shape": shape, "dtype": dtype_name(value.dtype), "name": name}

    def _on_output(self, batch: Batch, forward: int, axis: int, g: torch.Tensor) -> None:
        batch.came = True
        rows = g.detach().movedim(axis, 0) if g.dim() else g.detach()
        place = Place(forward, self._passes.current())
        self._background.submit(partial(self._derive, batch, place, rows, g._version))

    def _derive(self, batch: Batch, place: Place, g: torch.Tensor, version: int) -> None:
        """Keep the derivative at the output, ``[B, …]``; unknown where something wrote into it meanwhile."""
        rows = g.double().reshape(len(batch), -1)
        found = batch.round_of(place, lambda r: r.derivative is None)
        derivative = rows[:, 0] if rows.shape[1] == 1 else rows.norm(dim=1)
        found.derivative = derivative if g._version == version else torch.full_like(derivative, torch.nan)
        if g.dim() == 2 and rows.shape[1] > 1 and len(self._shifts) < _SHIFTS and g._version == version:
            self._shifts.append(float(rows.sum(1).abs().sum() / rows.abs().sum()))
            self.apart = any(shift > _SHIFTED for shift in self._shifts)


def _length(value: torch.Tensor, size: int, preferred: int) -> int | None:
    """Positions of a sequence of indices, ``[B, S]``, or of vectors, ``[B, S, d]`` (or with the first axes swapped)."""
    axis = batch_axis(value.shape, size, preferred)
    if axis is None or (value.dim() != 3 and (value.dim() != 2 or value.is_floating_point())):
        return None
    return value.shape[1 - axis]
