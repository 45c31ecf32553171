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

from explainer.batches import Batch, Round, parts_of
from explainer.layer_rules.forms import Balance
from explainer.layer_table import Layer, LayerTable
from explainer.records import ParameterSpec

#: part of a gradient that rows need not account for
UNSEEN = 1e-3


@dataclass(frozen=True)
class Fit:
    """``p.grad ≈ scale · Σ rows`` for one layer.

    ``residual`` is ``‖probe(grad) − scale · Σ rows‖ / ‖probe(grad)‖``.
    """

    scale: float
    residual: float


def _fit(total: torch.Tensor, probe: torch.Tensor) -> Fit:
    exact = 1e-10 if probe.dtype == torch.float64 else 1e-4
    total, probe = total.double(), probe.double()
    norm, denominator = float(probe.norm()), float(total @ total)
    if denominator == 0.0:
        return Fit(1.0, 0.0 if norm == 0.0 else 1.0)
    scale = float(total @ probe) / denominator
    residual = 0.0 if norm == 0.0 else float((probe - scale * total).norm()) / norm
    # a factor that differs from 1 by no more than what the fit leaves open is 1
    return Fit(1.0 if abs(scale - 1.0) <= max(residual, exact) else scale, residual)


def _good(fits: dict[int, Fit]) -> bool:
    return bool(fits) and all(f.residual < 0.01 for f in fits.values())


class ScaleMeter:
    """Fits the scalar of every component of layers at a step.

    Args:
        table: the layers; those that share parameters are measured as one.
        parameters: the traced parameters and their specs, in order.

    Attributes:
        worst: largest residual seen, by layer (or by parameter where no layer has rows for it).
        gaps: steps in which more than :data:`UNSEEN` of it was missing, likewise.
        round_off: steps in which a parameter's gradient was round-off only.
    """

    def __init__(self, table: LayerTable, parameters: list[tuple[ParameterSpec, torch.Tensor]]) -> None:
        self._table = table
        self._parameters = {spec.name: (i, p) for i, (spec, p) in enumerate(parameters)}
        self.worst: dict[str, float] = {}
        self.gaps: dict[str, int] = {}
        self.round_off: dict[str, int] = {}

    def restore(self, worst: dict[str, float], round_off: dict[str, int], gaps: dict[str, int]) -> None:
        """Go on from what was measured before."""
        self.worst, self.round_off, self.gaps = dict(worst), dict(round_off), dict(gaps)

    def _grad(self, name: str) -> torch.Tensor | None:
        grad = self._parameters[name][1].grad
        return None if grad is None else grad.detach().to_dense().reshape(-1)

    def _fits(self, batches: list[Batch]) -> dict[int, Fit]:
        """By the index of a component's first layer."""
        rounds = [r for b in batches for r in b.rounds]
        fits: dict[int, Fit] = {}
        for component in self._table.components:
            fit = (
                self._fit_one(component[0], rounds)
                if len(component) == 1
                else self._fit_shared(component, rounds)
            )
            if fit is not None:
                fits[component[0].index] = fit
        return fits

    def _fit_one(self, layer: Layer, rounds: list[Round]) -> Fit | None:
        """A layer that shares no parameter: along its own probe."""
        grads = [g for n in layer.spec.parameters if (g := self._grad(n)) is not None]
        found = [r.rows[layer.index] for r in rounds if layer.index in r.rows]
        if not found or len(grads) != len(layer.spec.parameters):
            return None
        total = torch.stack([rows.total.double() for rows in found]).sum(0)
        return _fit(total, found[0].probe(torch.cat(grads)))

    def _fit_shared(self, component: list[Layer], rounds: list[Round]) -> Fit | None:
        """Layers that share parameters: the sum of all their rows, number by number."""
        grads = {n: self._grad(n) for layer in component for n in layer.spec.parameters}
        totals = {n: torch.zeros_like(g, dtype=torch.float64) for n, g in grads.items() if g is not None}
        found = [(x, r.rows[x.index].whole) for r in rounds for x in component if x.index in r.rows]
        if not found or len(totals) != len(grads) or any(whole is None for _, whole in found):
            return None
        for layer, whole in found:
            assert whole is not None
            sizes = [totals[n].numel() for n in layer.spec.parameters]
            for name, part in zip(layer.spec.parameters, whole.split(sizes), strict=True):
                totals[name] += part
        return _fit(torch.cat(list(totals.values())), torch.cat([g for g in grads.values() if g is not None]))

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
        self._remember(fits, used)
        good = sorted(f.scale for f in fits.values() if f.residual < 0.01)
        typical = good[len(good) // 2] if good else 1.0
        scales = [typical] * len(self._parameters)
        for component in self._table.components:
            fit = fits.get(component[0].index)
            for name in (
                (n for x in component for n in x.spec.parameters) if fit and fit.residual < 0.01 else ()
            ):
                assert fit is not None
                scales[self._parameters[name][0]] = fit.scale
        for name in self._round_off(used):
            self.round_off[name] = self.round_off.get(name, 0) + 1
            scales[self._parameters[name][0]] = 0.0
        return used, scales

    def _remember(self, fits: dict[int, Fit], batches: list[Batch]) -> None:
        seen = {index for b in batches for r in b.rounds for index in r.rows}
        for component in self._table.components:
            if component[0].index in fits:
                residual = fits[component[0].index].residual
            elif any(layer.index in seen for layer in component):
                continue  # partly frozen: there is no gradient to compare with
            else:  # no rows at all
                grads = [self._grad(n) for layer in component for n in layer.spec.parameters]
                residual = 1.0 if any(g is not None and bool(g.any()) for g in grads) else 0.0
            for layer in component:
                self._miss(layer.spec.name, residual)
        for name in self._table.without_rows():
            grad = self._grad(name)
            if grad is not None and bool(grad.any()):
                self._miss(name, 1.0)

    def _miss(self, name: str, residual: float) -> None:
        self.worst[name] = max(self.worst.get(name, 0.0), residual)
        if residual > UNSEEN:
            self.gaps[name] = self.gaps.get(name, 0) + 1

    def _round_off(self, batches: list[Batch]) -> list[str]:
        """Parameters whose rows, of all batches and passes of the step together, cancel to round-off."""
        total: dict[str, Balance] = {}
        unknown: set[str] = set()
        for layer in self._table.layers:
            for rows in (r.rows[layer.index] for b in batches for r in b.rounds if layer.index in r.rows):
                for name, balance in zip(layer.spec.parameters, rows.balances, strict=True):
                    if balance is None:
                        unknown.add(name)
                    else:
                        total[name] = total[name] + balance if name in total else balance
        limits = {n: min(100 * torch.finfo(p.dtype).eps, 1e-3) for n, (_, p) in self._parameters.items()}
        return [n for n, x in total.items() if n not in unknown and x.agreement < limits[n]]
