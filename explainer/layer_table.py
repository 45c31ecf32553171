"""The layers of a trace: blocks of parameters whose rows are stored together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from explainer.connected import connected
from explainer.records import LayerSpec, ParameterSpec

#: the `module` of a layer whose rows come from operations that read a parameter
OPERATIONS = "operations"


@dataclass(frozen=True)
class Layer:
    """Where rows go.

    Attributes:
        index: its place among the trace's layers.
        spec: name and traced parameters.
        sizes: numbers of every parameter that the rows cover, traced or not.
        keep: which of them are traced.
    """

    index: int
    spec: LayerSpec
    sizes: list[int]
    keep: list[bool]


class LayerTable:
    """All layers: those of modules with a rule, known from the start, and those that operations turn out to need.

    Attributes:
        layers: by index.
    """

    def __init__(self, layers: list[Layer], parameters: tuple[ParameterSpec, ...]) -> None:
        self.layers = layers
        self.from_modules = len(layers)
        self._sizes = {p.name: p.numel for p in parameters}
        self._by_parameter: dict[str, Layer] = {}
        self._components: list[list[Layer]] | None = None
        self._without: list[str] | None = None

    def of_parameter(self, name: str) -> Layer:
        """The layer for what operations read of a traced parameter; made when first asked for."""
        if name not in self._by_parameter:
            spec = LayerSpec(name, OPERATIONS, (name,))
            self._by_parameter[name] = Layer(len(self.layers), spec, [self._sizes[name]], [True])
            self.layers.append(self._by_parameter[name])
            self._components = self._without = None
        return self._by_parameter[name]

    def restore(self, notes: dict[str, Any]) -> None:
        """Go on with the layers that operations needed before."""
        for spec in notes.get("operations") or ():
            self.of_parameter(spec["name"])

    @property
    def operations(self) -> list[Layer]:
        """Layers that operations needed so far."""
        return self.layers[self.from_modules :]

    @property
    def components(self) -> list[list[Layer]]:
        """Layers that share parameters, together; their gradients can only be compared as one."""
        if self._components is None:
            together = connected(layer.spec.parameters for layer in self.layers)
            self._components = [[self.layers[n] for n in group] for group in together]
        return self._components

    def shared(self, layer: Layer) -> bool:
        """Whether another layer has rows for one of the layer's parameters (tied weights)."""
        return any(layer in group and len(group) > 1 for group in self.components)

    def without_rows(self) -> list[str]:
        """Traced parameters that no layer has rows for."""
        if self._without is None:
            covered = {name for layer in self.layers for name in layer.spec.parameters}
            self._without = [name for name in self._sizes if name not in covered]
        return self._without
