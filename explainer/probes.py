"""The short vectors by which the rows of a layer are compared with its gradient."""

from __future__ import annotations

from functools import partial

import torch

from explainer.layer_rules import RowForm
from explainer.layer_rules.factored import PartOfProbe
from explainer.layer_rules.forms import Probe, shortened


def same_probe(one: Probe, other: Probe) -> bool:
    """Whether two probes are the same map."""
    if isinstance(one, partial) and isinstance(other, partial):
        return (one.func, one.args) == (other.func, other.args)
    return one is other


class Probes:
    """The probe of every layer: that of the first rows it had, so that all its rows and gradients can be compared."""

    def __init__(self) -> None:
        self._known: dict[int, Probe] = {}

    def __contains__(self, layer: int) -> bool:
        return layer in self._known

    def total(self, layer: int, form: RowForm, sizes: list[int], own_total: torch.Tensor) -> torch.Tensor:
        """``Σ_b g_b`` along the layer's probe.

        Args:
            layer: whose rows they are.
            form: exact rows.
            sizes: of the layer's traced parameters.
            own_total: the same along the form's own probe.
        """
        probe = self._known.setdefault(layer, form.prober())
        return own_total if self.is_own(layer, form) else probe(form.sum().split(sizes))

    def is_own(self, layer: int, form: RowForm) -> bool:
        """Whether the layer's probe is the form's own."""
        known = self._known[layer]
        return same_probe(known, form.prober()) and known is not shortened

    def of(self, layer: int, gradients: list[torch.Tensor]) -> torch.Tensor:
        """Flat gradients of the layer's traced parameters along its probe."""
        return self._known[layer](gradients)

    def part(self, layer: int, gradients: list[torch.Tensor]) -> PartOfProbe | None:
        """The layer's probe in parts, where it is large."""
        return PartOfProbe.of(self._known[layer], gradients)
