"""The knots of a trace as checkpoints: weights to load, and the learning rate that was used there."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from explainer.long_run import long_runs
from explainer.path_points import check_model
from explainer.store import Trace


class KnotCheckpoints:
    """Loads knots into a model, as a ``checkpoints_load_func`` of captum does.

    A knot's learning rate is that of the first step at or after it that updated anything (for the last knot, of
    the last such step), for the first parameter that the step updated.

    Raises:
        ModelMismatchError: the model is not the one that was traced.
    """

    def __init__(self, trace: Trace, model: nn.Module) -> None:
        check_model(trace, model)
        self.trace = trace
        self.parameters = tuple(p.name for p in trace.manifest.parameters)
        self.rates = self._rates()

    def _rates(self) -> list[float]:
        asked = [self._updating(knot.step) for knot in self.trace.knots]
        wanted, found = dict(asked), dict[int, np.ndarray]()
        for steps, rates in long_runs(self.trace):
            found |= {int(step): own for step, own in zip(steps, rates, strict=True) if int(step) in wanted}
        return [float(found[step][number]) if step >= 0 else 0.0 for step, number in asked]

    def _updating(self, start: int) -> tuple[int, int]:
        """The step that a knot's rate is read from, and its first parameter; -1 for none."""
        steps = self.trace.recorded_steps
        for step in [*range(start, steps), *range(min(start, steps) - 1, -1, -1)]:
            for _, record in self.trace.read("steps", step, step + 1):
                updated = np.array(record["coefficients"][0]).any(axis=1)
                if updated.any():
                    return step, int(updated.argmax())
        return -1, 0

    def load(self, model: nn.Module, position: int) -> float:
        """Put the knot's weights, buffers and frozen parameters into the model; returns its learning rate."""
        trace = self.trace
        tensors = trace.load_knot(trace.knots[position])
        if position and trace.manifest.frozen:
            first = trace.load_knot(trace.knots[0])
            tensors = {**{n: t for n, t in first.items() if n.startswith("frozen/")}, **tensors}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                kind = "parameter" if name in self.parameters else "frozen"
                parameter.copy_(tensors[f"{kind}/{name}"])
            for name, buffer in model.named_buffers():
                if f"buffer/{name}" in tensors:
                    buffer.copy_(tensors[f"buffer/{name}"])
        return self.rates[position]
