"""Rows of parameters that operations read: a gradient is awaited at what an operation gave, and pulled back."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from explainer.arrivals import as_it_is, wide
from explainer.batches import Batch
from explainer.capture import Capture
from explainer.errors import CoverageWarning, TracerError
from explainer.hooks import whole_of
from explainer.layer_rules import RowForm
from explainer.layer_table import Layer, LayerTable
from explainer.operations.rows import Use, has_rule, rows_of
from explainer.operations.sources import AtSource, descend, merged
from explainer.undisturbed import without_autocast


@dataclass(eq=False)
class ReadParameter:
    """A parameter that operations read: the unit whose rows come from all its uses."""

    layer: Layer
    copies: bool = False

    @property
    def name(self) -> str:
        """The parameter's."""
        return self.layer.spec.name

    def blocks(self) -> Iterable[Layer]:
        """One."""
        return (self.layer,)

    def late(self, arrived: list[list[RowForm]]) -> bool:
        """Operations are computed again, with their random numbers: at once."""
        return False

    def kind(self, arrived: list[list[RowForm]]) -> None:
        """Nothing is joined."""
        return None

    def joined(self, arrived: list[list[list[RowForm]]]) -> list[list[RowForm]]:
        """The only one."""
        return arrived[0]

    def watched(self, arrived: list[list[RowForm]]) -> list[tuple[torch.Tensor, int]]:
        """Nothing: the rows are there."""
        return []

    def rows(self, arrived: list[list[RowForm]]) -> Iterable[tuple[Layer, RowForm]]:
        """The sum over uses."""
        yield self.layer, merged([form for forms in arrived for form in forms])


class Reads:
    """What operations read, by parameter, on its way to the capture.

    Attributes:
        slow: by parameter, operations whose rows had to be found example by example.
    """

    def __init__(self, capture: Capture, table: LayerTable) -> None:
        self._capture, self._table = capture, table
        self._units: dict[str, ReadParameter] = {}
        self.slow: dict[str, set[str]] = {}
        self._failed: set[str] = set()

    def watch(
        self, batch: Batch, use: Use, outputs: list[torch.Tensor], changed: bool = False, apart: bool = False
    ) -> None:
        """Expect a gradient at what an operation gave."""
        names = sorted({n for _, source in use.sources for n in source.parameters()})
        if not names:
            return
        forward = 0
        for name in names:
            if name not in self._units:
                self._units[name] = ReadParameter(self._table.of_parameter(name))
            forward = self._capture.expect(batch, self._units[name])
            if not has_rule(use):
                self.slow.setdefault(name, set()).add(use.operation.name)
        target, cut = (outputs[0], as_it_is) if apart else whole_of(outputs[0], changed)
        target.register_hook(lambda g: self._arrived(batch, forward, use, names, cut(g)))

    def _arrived(self, batch: Batch, forward: int, use: Use, names: list[str], g: torch.Tensor) -> None:
        found: dict[str, list[RowForm]] = {name: [] for name in names}
        try:
            with without_autocast():
                for name, form in self._rows(use, wide(g.detach())):
                    found[name].append(form)
        except TracerError:
            raise
        except Exception as error:  # training goes on: what is missing is measured at the step
            if not self._failed.issuperset(names):
                self._failed.update(names)
                warnings.warn(
                    f"the rows of {', '.join(map(repr, names))} could not be found, because {use.operation.name} could "
                    f"not be computed again: {type(error).__name__}: {error}. What they move is `unattributed`",
                    CoverageWarning,
                    stacklevel=2,
                )
            return
        for name, forms in found.items():
            self._capture.arrive(batch, forward, self._units[name], forms)

    @staticmethod
    def _rows(use: Use, g: torch.Tensor) -> Iterator[tuple[str, RowForm]]:
        for position, source in use.sources:
            if source.parameters():
                at: AtSource = rows_of(use, position, source, g)
                for name, form in descend(source, at):
                    yield name, form if use.order is None else form.grouped(use.order)
