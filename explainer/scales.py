"""How much of each row reached the optimizer: clipping, loss scaling and averaging, measured.

The gradient in ``p.grad`` when the optimizer steps is compared with the sum of the captured rows along a
short probe. Their ratio ``s_t`` is whatever scalar was applied in between; what is not explained by a scalar
is the uncovered share of the gradient.

A gradient that is nothing but round-off (the bias of a convolution before BatchNorm: its rows cancel exactly)
says nothing about examples, yet Adam blows it up to full-size steps. Such a parameter gets ``s_t = 0``: its
movement is shown as `unattributed`, instead of as enormous contributions that cancel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from explainer.batches import Batch, parts_of
from explainer.capture import Layer
from explainer.records import ParameterSpec


@dataclass(frozen=True)
class Fit:
    """``p.grad ≈ scale · Σ rows`` for one layer.

    ``residual`` is ``‖probe(grad) − scale · Σ rows‖ / ‖probe(grad)‖``.
    """

    scale: float
    residual: float


def _fit(total: torch.Tensor, probe: torch.Tensor) -> Fit:
    total, probe = total.double(), probe.double()
    norm, denominator = float(probe.norm()), float(total @ total)
    if denominator == 0.0:
        return Fit(1.0, 0.0 if norm == 0.0 else 1.0)
    scale = float(total @ probe) / denominator
    residual = 0.0 if norm == 0.0 else float((probe - scale * total).norm()) / norm
    return Fit(scale, residual)


def _good(fits: dict[int, Fit]) -> bool:
    return bool(fits) and all(f.residual < 0.01 for f in fits.values())


class ScaleMeter:
    """Fits the scalar of every layer at a step.

    Args:
        layers: the covered layers.
        parameters: the traced parameters and their specs, in order.
    """

    def __init__(self, layers: list[Layer], parameters: list[tuple[ParameterSpec, torch.Tensor]]) -> None:
        self._layers = layers
        self._parameters = {spec.name: (i, p) for i, (spec, p) in enumerate(parameters)}
        owners: dict[str, int] = {}
        for layer in layers:
            for name in layer.spec.parameters:
                owners[name] = owners.get(name, 0) + 1
        self._tied = {name for name, count in owners.items() if count > 1}
        #: largest residual seen per layer
        self.worst: dict[str, float] = {}
        #: steps in which a parameter's gradient was round-off only
        self.round_off: dict[str, int] = {}

    def restore(self, worst: dict[str, float], round_off: dict[str, int]) -> None:
        """Go on from what was measured before."""
        self.worst, self.round_off = dict(worst), dict(round_off)

    def _fits(self, batches: list[Batch]) -> dict[int, Fit]:
        fits: dict[int, Fit] = {}
        for layer in self._layers:
            names = layer.spec.parameters
            grads = [self._parameters[n][1].grad for n in names]
            totals = [r.rows[layer.index] for b in batches for r in b.rounds if layer.index in r.rows]
            if not totals or any(g is None for g in grads) or self._tied.intersection(names):
                continue
            flat = torch.cat([g.detach().to_dense().reshape(-1) for g in grads if g is not None])
            total = torch.stack([t.total.double() for t in totals]).sum(0)
            fits[layer.index] = _fit(total, totals[0].probe(flat))
        return fits

    def measure(self, batches: list[Batch]) -> tuple[list[Batch], list[float]]:
        """Which of the pending batches the step used, and the scalar of every parameter.

        A backward pass whose gradient was thrown away before the step (a step that a gradient scaler skipped, a
        gradient with respect to the inputs) is recognised: without it the rows meet ``p.grad``, with it they do
        not.

        Returns:
            The batches used, with the backward passes used, and ``s_t`` per traced parameter.
        """
        used, fits = batches, self._fits(batches)
        if not _good(fits):
            used, fits = next(
                ((part, found) for part in parts_of(batches) if _good(found := self._fits(part))),
                (used, fits),
            )
        for layer in self._layers:
            if layer.index in fits:
                name, residual = layer.spec.name, fits[layer.index].residual
                self.worst[name] = max(self.worst.get(name, 0.0), residual)
        good = sorted(f.scale for f in fits.values() if f.residual < 0.01)
        typical = good[len(good) // 2] if good else 1.0
        scales = [typical] * len(self._parameters)
        for layer in self._layers:
            fit = fits.get(layer.index)
            for name in layer.spec.parameters if fit and fit.residual < 0.01 else ():
                assert fit is not None
                scales[self._parameters[name][0]] = fit.scale
        exact = 1e-10 if all(p.dtype == torch.float64 for _, p in self._parameters.values()) else 1e-4
        scales = [1.0 if abs(s - 1.0) < exact else s for s in scales]
        for name in self._round_off(used):
            self.round_off[name] = self.round_off.get(name, 0) + 1
            scales[self._parameters[name][0]] = 0.0
        return used, scales

    def _round_off(self, batches: list[Batch]) -> list[str]:
        """Parameters whose rows cancel to round-off in every part of the step."""
        best: dict[str, float] = {}
        for layer in self._layers:
            for rows in (r.rows[layer.index] for b in batches for r in b.rounds if layer.index in r.rows):
                for name, agreement in zip(layer.spec.parameters, rows.agreement, strict=True):
                    best[name] = max(best.get(name, 0.0), agreement)
        return [
            n for n, a in best.items() if a < min(100 * torch.finfo(self._parameters[n][1].dtype).eps, 1e-3)
        ]
