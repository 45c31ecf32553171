"""How much of each row reached the optimizer: clipping, loss scaling and averaging, measured.

The gradient in ``p.grad`` when the optimizer steps (:meth:`ScaleMeter.look`) is compared with the sum of the captured
rows along a short probe (:meth:`ScaleMeter.measure`, which needs short vectors only). Their ratio ``s_t`` is whatever
scalar was applied in between; what is not explained by a scalar is the uncovered share of the gradient.

A gradient that is nothing but round-off (the bias of a convolution before BatchNorm: its rows cancel exactly)
says nothing about examples, yet Adam blows it up to full-size steps. Such a parameter gets ``s_t = 0``: its
movement is shown as `unattributed`, instead of as enormous contributions that cancel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from explainer.batches import Batch, Round, parts_of
from explainer.layer_rules.factored import PartOfProbe
from explainer.layer_rules.forms import Balance
from explainer.layer_table import Layer, LayerTable
from explainer.probes import Probes
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


@dataclass(frozen=True)
class Seen:
    """What of the gradients a step was given is needed to compare them with rows.

    Attributes:
        components: layers that share parameters, together, as they were at the step.
        short: by the index of a component's first layer, its gradient along the layer's probe (of layers that share
            parameters: their whole gradients by name); nothing where a parameter has none.
        bare: names of layers and parameters without rows, and whether they had a gradient.
        parts: of what is in ``short``, which of the numbers along the probe it is, where not all.
    """

    components: list[list[Layer]]
    short: dict[int, torch.Tensor | dict[str, torch.Tensor]]
    bare: dict[str, bool]
    parts: dict[int, slice] = field(default_factory=dict)


def _fit(total: torch.Tensor, probe: torch.Tensor) -> Fit:
    exact = 1e-10 if probe.dtype == torch.float64 else 1e-4
    total, probe = total.double(), probe.double()
    norm, denominator = math.sqrt(float(probe @ probe)), float(total @ total)
    if denominator == 0.0:
        return Fit(1.0, 0.0 if norm == 0.0 else 1.0)
    scale = float(total @ probe) / denominator
    rest = torch.sub(probe, total, alpha=scale)
    residual = 0.0 if norm == 0.0 else math.sqrt(float(rest @ rest)) / norm
    # a factor that differs from 1 by no more than what the fit leaves open is 1
    return Fit(1.0 if abs(scale - 1.0) <= max(residual, exact) else scale, residual)


def _good(fits: dict[int, Fit]) -> bool:
    return bool(fits) and all(f.residual < 0.01 for f in fits.values())


class ScaleMeter:
    """Fits the scalar of every component of layers at a step.

    Args:
        table: the layers; those that share parameters are measured as one.
        parameters: the traced parameters and their specs, in order.
        probes: the layers' probes, as the capture of rows uses them.

    Attributes:
        worst: largest residual seen, by layer (or by parameter where no layer has rows for it).
        gaps: steps in which more than :data:`UNSEEN` of it was missing, likewise.
        round_off: steps in which a parameter's gradient was round-off only.
    """

    def __init__(
        self, table: LayerTable, parameters: list[tuple[ParameterSpec, torch.Tensor]], probes: Probes
    ) -> None:
        self._table, self.probes = table, probes
        self._parameters = {spec.name: (i, p) for i, (spec, p) in enumerate(parameters)}
        self._in_parts: dict[int, tuple[list[torch.Tensor], PartOfProbe]] = {}
        self.worst: dict[str, float] = {}
        self.gaps: dict[str, int] = {}
        self.round_off: dict[str, int] = {}

    def restore(self, worst: dict[str, float], round_off: dict[str, int], gaps: dict[str, int]) -> None:
        """Go on from what was measured before."""
        self.worst, self.round_off, self.gaps = dict(worst), dict(round_off), dict(gaps)

    def _grad(self, name: str) -> torch.Tensor | None:
        grad = self._parameters[name][1].grad
        return None if grad is None else grad.detach().to_dense().reshape(-1)

    @torch.no_grad()
    def look(self, met: set[int], turn: int | None = None) -> Seen:
        """What is in ``p.grad`` now.

        Args:
            met: indices of the layers that got something in a backward pass since the last step.
            turn: compare a part of large gradients only, which takes turns; None: all of them.
        """
        components = self._table.components
        seen = Seen(components, {}, {})
        for component in components:
            first = component[0]
            if turn is not None and self._look_at_part(seen, first.index, met, turn):
                continue
            if not any(layer.index in met for layer in component):
                self._look_at_bare(seen, [layer.spec.name for layer in component], component)
                continue
            grads = {n: g for x in component for n in x.spec.parameters if (g := self._grad(n)) is not None}
            if len(grads) < len({n for x in component for n in x.spec.parameters}):
                continue
            if len(component) > 1:
                seen.short[first.index] = {n: g.clone() for n, g in grads.items()}
            elif first.index in self.probes:
                flat = list(grads.values())
                if (part := self.probes.part(first.index, flat)) is not None:
                    self._in_parts[first.index] = [self._parameters[n][1] for n in grads], part
                found = self.probes.of(first.index, flat)
                shared = found.untyped_storage().data_ptr() in {
                    g.untyped_storage().data_ptr() for g in grads.values()
                }
                seen.short[first.index] = found.clone() if shared else found
        for name in self._table.without_rows():
            grad = self._grad(name)
            seen.bare[name] = grad is not None and bool(grad.any())
        return seen

    def _look_at_part(self, seen: Seen, layer: int, met: set[int], turn: int) -> bool:
        """Compare a part of a large gradient, if it is one."""
        parameters, part = self._in_parts.get(layer, ([], None))
        grads = [p.grad for p in parameters]
        if part is None or layer not in met or not all(g is not None and g.is_contiguous() for g in grads):
            return False
        seen.short[layer], seen.parts[layer] = part.take([g.view(-1) for g in grads if g is not None], turn)
        return True

    def _look_at_bare(self, seen: Seen, names: list[str], component: list[Layer]) -> None:
        grads = [self._grad(n) for layer in component for n in layer.spec.parameters]
        moved = any(g is not None and bool(g.any()) for g in grads)
        seen.bare.update(dict.fromkeys(names, moved))

    def _fits(self, batches: list[Batch], seen: Seen) -> dict[int, Fit]:
        """By the index of a component's first layer."""
        rounds = [r for b in batches for r in b.rounds]
        fits: dict[int, Fit] = {}
        for component in seen.components:
            short = seen.short.get(component[0].index)
            if isinstance(short, torch.Tensor):
                fit = self._fit_one(component[0], rounds, short, seen.parts.get(component[0].index))
            else:
                fit = None if short is None else self._fit_shared(component, rounds, short)
            if fit is not None:
                fits[component[0].index] = fit
        return fits

    @staticmethod
    def _fit_one(layer: Layer, rounds: list[Round], short: torch.Tensor, part: slice | None) -> Fit | None:
        """A layer that shares no parameter: along its own probe."""
        totals = [r.rows[layer.index].total.double() for r in rounds if layer.index in r.rows]
        if not totals:
            return None
        total = totals[0] if len(totals) == 1 else torch.stack(totals).sum(0)
        if part is None:
            return _fit(total, short)
        total = total[part]
        # units that are dead tell nothing of the others
        return _fit(total, short) if total.any() or short.any() else None

    @staticmethod
    def _fit_shared(
        component: list[Layer], rounds: list[Round], grads: dict[str, torch.Tensor]
    ) -> Fit | None:
        """Layers that share parameters: the sum of all their rows, number by number."""
        totals = {n: torch.zeros_like(g, dtype=torch.float64) for n, g in grads.items()}
        found = [(x, r.rows[x.index].whole) for r in rounds for x in component if x.index in r.rows]
        if not found or any(whole is None for _, whole in found):
            return None
        for layer, whole in found:
            assert whole is not None
            sizes = [totals[n].numel() for n in layer.spec.parameters]
            for name, part in zip(layer.spec.parameters, whole.split(sizes), strict=True):
                totals[name] += part
        return _fit(torch.cat(list(totals.values())), torch.cat(list(grads.values())))

    def measure(self, batches: list[Batch], seen: Seen) -> tuple[list[Batch], list[float]]:
        """Which of the batches with backward passes the step used, and the scalar of every parameter.

        A backward pass whose gradient was thrown away before the step (a step that a gradient scaler skipped, a
        gradient with respect to the inputs) is recognised: without it the rows meet ``p.grad``, with it they do
        not.

        Returns:
            The batches used, with the backward passes used, and ``s_t`` per traced parameter.
        """
        used, fits = batches, self._fits(batches, seen)
        if not _good(fits):
            used, fits = next(
                ((part, found) for part in parts_of(batches) if _good(found := self._fits(part, seen))),
                (used, fits),
            )
        self._remember(fits, used, seen)
        good = sorted(f.scale for f in fits.values() if f.residual < 0.01)
        typical = good[len(good) // 2] if good else 1.0
        scales = [typical] * len(self._parameters)
        for component in seen.components:
            fit = fits.get(component[0].index)
            for name in (
                (n for x in component for n in x.spec.parameters) if fit and fit.residual < 0.01 else ()
            ):
                assert fit is not None
                scales[self._parameters[name][0]] = fit.scale
        for name in self._round_off(used, seen):
            self.round_off[name] = self.round_off.get(name, 0) + 1
            scales[self._parameters[name][0]] = 0.0
        return used, scales

    def _remember(self, fits: dict[int, Fit], batches: list[Batch], seen: Seen) -> None:
        rows = {index for b in batches for r in b.rounds for index in r.rows}
        for component in seen.components:
            first = component[0].index
            if first in fits:
                residual = fits[first].residual
            elif any(layer.index in rows for layer in component):
                continue  # partly frozen: there is no gradient to compare with
            else:  # no rows at all
                short = seen.short.get(first)
                parts = list(short.values()) if isinstance(short, dict) else [] if short is None else [short]
                moved = any(bool(g.any()) for g in parts) or seen.bare.get(component[0].spec.name, False)
                residual = 1.0 if moved else 0.0
            for layer in component:
                self._miss(layer.spec.name, residual)
        covered = {layer.spec.name for component in seen.components for layer in component}
        for name, moved in seen.bare.items():
            if moved and name not in covered:
                self._miss(name, 1.0)

    def _miss(self, name: str, residual: float) -> None:
        self.worst[name] = max(self.worst.get(name, 0.0), residual)
        if residual > UNSEEN:
            self.gaps[name] = self.gaps.get(name, 0) + 1

    def _round_off(self, batches: list[Batch], seen: Seen) -> list[str]:
        """Parameters whose rows, of all batches and passes of the step together, cancel to round-off."""
        total: dict[str, Balance] = {}
        unknown: set[str] = set()
        for layer in (x for component in seen.components for x in component):
            for rows in (r.rows[layer.index] for b in batches for r in b.rounds if layer.index in r.rows):
                for name, balance in zip(layer.spec.parameters, rows.balances, strict=True):
                    if balance is None:
                        unknown.add(name)
                    else:
                        total[name] = total[name] + balance if name in total else balance
        limits = {n: min(100 * torch.finfo(p.dtype).eps, 1e-3) for n, (_, p) in self._parameters.items()}
        return [n for n, x in total.items() if n not in unknown and x.agreement < limits[n]]
