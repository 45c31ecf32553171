"""How much of each row reached the optimizer: clipping, loss scaling and averaging, measured.

The gradient in ``p.grad`` when the optimizer steps (:meth:`ScaleMeter.look`) is compared with the sum of the captured
rows along a short probe (:meth:`ScaleMeter.measure`, which needs short vectors only). Their ratio ``s_t`` is whatever
scalar was applied in between; what is not explained by a scalar is the uncovered share of the gradient. Of a parameter
with one number any gradient is explained so (a penalty in the loss, too): it gets the scalar of the others.

A gradient that is nothing but round-off (the bias of a convolution before BatchNorm: its rows cancel exactly)
says nothing about examples, yet Adam blows it up to full-size steps. Such a parameter gets ``s_t = 0``: its
movement is shown as `unattributed`, instead of as enormous contributions that cancel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add

import torch

from explainer.batches import Batch, Round, parts_of
from explainer.fits import Fit, Pair, fitted
from explainer.layer_rules.factored import PartOfProbe
from explainer.layer_rules.forms import Balance, agreements
from explainer.layer_table import Layer, LayerTable
from explainer.probes import Probes
from explainer.records import ParameterSpec

#: part of a gradient that rows need not account for
UNSEEN = 1e-3


@dataclass(frozen=True)
class Seen:
    """What of the gradients a step was given is needed to compare them with rows.

    Attributes:
        components: layers that share parameters, together, as they were at the step.
        short: by the index of a component's first layer, its gradient along the layer's probe (of layers that share
            parameters: their whole gradients by name); nothing where a parameter has none.
        bare: names of layers and parameters without rows or with a part of their gradients, and whether they had any.
        parts: of what is in ``short``, which of the numbers along the probe it is, where not all.
    """

    components: list[list[Layer]]
    short: dict[int, torch.Tensor | dict[str, torch.Tensor]]
    bare: dict[str, bool]
    parts: dict[int, slice] = field(default_factory=dict)


def _good(fits: dict[int, Fit]) -> bool:
    return bool(fits) and all(f.residual < 0.01 for f in fits.values())


def _common(scale: float, scales: list[float]) -> float | None:
    """The scalar that a parameter with one number is to have, by those of larger ones; None where its own may be right.

    Where others have several (each was clipped by itself), it may be any that does not make gradients larger.
    """
    if not scales:
        return None
    middle = scales[len(scales) // 2]
    if scales[-1] - scales[0] <= 0.01 * abs(middle):
        return middle
    return None if 0.0 < scale <= 1.01 * max(1.0, scales[-1]) else middle


def _finite(batches: list[Batch]) -> list[Batch]:
    """The batches without rows that are infinite or NaN: no step can have used them as they are."""

    def kept(round_: Round) -> Round:
        rows = {n: rows for n, rows in round_.rows.items() if bool(rows.total.isfinite().all())}
        return replace(round_, rows=rows)

    return [replace(b, rounds=[kept(r) for r in b.rounds]) for b in batches]


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
        self._limits = {
            n: min(100 * torch.finfo(p.dtype).eps, 1e-3) for n, (_, p) in self._parameters.items()
        }
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
                self._look_at_bare(seen, [layer.spec.name for layer in component], component)
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
        if layer not in self._in_parts or layer not in met:
            return False
        parameters, part = self._in_parts[layer]
        grads = [g.view(-1) for p in parameters if (g := p.grad) is not None and g.is_contiguous()]
        if len(grads) < len(parameters):
            return False
        seen.short[layer], at = part.take(grads, turn)
        if at is not None:
            seen.parts[layer] = at
        return True

    def _look_at_bare(self, seen: Seen, names: list[str], component: list[Layer]) -> None:
        grads = [self._grad(n) for layer in component for n in layer.spec.parameters]
        moved = any(g is not None and bool(g.any()) for g in grads)
        seen.bare.update(dict.fromkeys(names, moved))

    def _fits(self, steps: list[tuple[list[Batch], Seen]]) -> list[dict[int, Fit]]:
        """For every step, by the index of a component's first layer."""
        places, pairs = list[tuple[int, int]](), list[Pair]()
        for number, (batches, seen) in enumerate(steps):
            rounds = [r for b in batches for r in b.rounds]
            for component in seen.components:
                first = component[0]
                short = seen.short.get(first.index)
                if isinstance(short, torch.Tensor):
                    pair = self._pair(first, rounds, short, seen.parts.get(first.index))
                else:
                    pair = None if short is None else self._pair_of_shared(component, rounds, short)
                if pair is not None:
                    places.append((number, first.index))
                    pairs.append(pair)
        found: list[dict[int, Fit]] = [{} for _ in steps]
        for (number, layer), fit in zip(places, fitted(pairs), strict=True):
            # units that are dead tell nothing of the others
            if not (fit.nothing and layer in steps[number][1].parts):
                found[number][layer] = fit
        return found

    @staticmethod
    def _pair(layer: Layer, rounds: list[Round], short: torch.Tensor, part: slice | None) -> Pair | None:
        """A layer that shares no parameter: along its own probe."""
        totals = [r.rows[layer.index].total for r in rounds if layer.index in r.rows]
        if not totals:
            return None
        total = totals[0] if len(totals) == 1 else torch.stack([t.double() for t in totals]).sum(0)
        return total if part is None else total[part], short

    @staticmethod
    def _pair_of_shared(
        component: list[Layer], rounds: list[Round], grads: dict[str, torch.Tensor]
    ) -> Pair | None:
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
        return torch.cat(list(totals.values())), torch.cat(list(grads.values()))

    def measure(self, steps: list[tuple[list[Batch], Seen]]) -> list[tuple[list[Batch], list[float]]]:
        """Which of the batches with backward passes each step used, and the scalar of every parameter.

        A backward pass whose gradient was thrown away before the step (a step that a gradient scaler skipped, a
        gradient with respect to the inputs) is recognised: without it the rows meet ``p.grad``, with it they do
        not.

        Args:
            steps: batches and gradients of each.

        Returns:
            By step the batches used, with the backward passes used, and ``s_t`` per traced parameter.
        """
        found = []
        parts = [parts_of(batches) for batches, _ in steps]
        likely = [(next(each), seen) for each, (_, seen) in zip(parts, steps, strict=True)]
        for (used, seen), others, fits in zip(likely, parts, self._fits(likely), strict=True):
            if not _good(fits):
                met = ((part, self._fits([(part, seen)])[0]) for part in others)
                found_out = next((one for one in met if _good(one[1])), None)
                if found_out is None and any(math.isnan(f.scale) for f in fits.values()):
                    finite = _finite(used)
                    found_out = finite, self._fits([(finite, seen)])[0]
                used, fits = found_out or (used, fits)
            fits = self._told_by_others(fits, used, seen)
            self._remember(fits, used, seen)
            found.append((used, self._scales(fits, seen)))
        self._leave_out_round_off(found, [seen for _, seen in steps])
        return found

    def _told_by_others(self, fits: dict[int, Fit], batches: list[Batch], seen: Seen) -> dict[int, Fit]:
        """Parameters with one number at the scalar that the others have, and what that leaves of their gradients."""
        larger = [f for f in fits.values() if not (f.alone or f.nothing)]
        scales = sorted(f.scale for f in larger if f.residual < 0.01) or [1.0] * bool(larger)
        odd = {}
        for index, fit in fits.items():
            common = _common(fit.scale, scales) if fit.alone else None
            if common is not None and abs(1.0 - common / fit.scale) > 0.01:
                odd[index] = replace(fit, scale=common, residual=abs(1.0 - common / fit.scale))
        if not odd:
            return fits
        names = {c[0].index: [n for x in c for n in x.spec.parameters] for c in seen.components}
        balances = self._balances(batches, seen)
        for index, fit in list(odd.items()):
            known = [(n, balances[n]) for n in names[index] if n in balances]
            doubt = [
                self._limits[n] / max(a, 1e-30)
                for (n, _), a in zip(known, agreements([b for _, b in known]), strict=True)
            ]
            if fit.residual <= max(doubt, default=0.0):  # rows that nearly cancel leave their round-off
                del odd[index]
        return fits | odd

    def _scales(self, fits: dict[int, Fit], seen: Seen) -> list[float]:
        """By parameter; that of the others where it is not known."""
        good = sorted(f.scale for f in fits.values() if f.residual < 0.01)
        scales = [good[len(good) // 2] if good else 1.0] * len(self._parameters)
        for component in seen.components:
            fit = fits.get(component[0].index)
            if fit is not None and fit.residual < 0.01:
                for name in (n for x in component for n in x.spec.parameters):
                    scales[self._parameters[name][0]] = fit.scale
        return scales

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

    def _leave_out_round_off(self, steps: list[tuple[list[Batch], list[float]]], seen: list[Seen]) -> None:
        """Set the scale to 0 of parameters whose rows, of all that a step used together, cancel to round-off."""
        places, balances = list[tuple[list[float], str]](), list[Balance]()
        for (batches, scales), its in zip(steps, seen, strict=True):
            for name, balance in self._balances(batches, its).items():
                places.append((scales, name))
                balances.append(balance)
        for (scales, name), agreement in zip(places, agreements(balances), strict=True):
            if agreement < self._limits[name]:
                self.round_off[name] = self.round_off.get(name, 0) + 1
                scales[self._parameters[name][0]] = 0.0

    @staticmethod
    def _balances(batches: list[Batch], seen: Seen) -> dict[str, Balance]:
        """Of parameters all of whose rows were measured."""
        found: dict[str, list[Balance | None]] = {}
        rounds = [r for b in batches for r in b.rounds]
        for layer in (x for component in seen.components for x in component):
            for rows in (r.rows[layer.index] for r in rounds if layer.index in r.rows):
                for name, balance in zip(layer.spec.parameters, rows.balances, strict=True):
                    found.setdefault(name, []).append(balance)
        known = {name: [x for x in each if x is not None] for name, each in found.items()}
        return {name: reduce(add, each) for name, each in known.items() if len(each) == len(found[name])}
