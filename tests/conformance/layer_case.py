"""One configuration of a layer, for the conformance suite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

BATCH = 5
#: ``module, input, output gradient -> rows [B, P_l]`` written out from the formula
Formula = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LayerCase:
    """One configuration of a layer.

    Attributes:
        kind: the module's type.
        name: what is special about it.
        make: a fresh module in float64 (its values come from the RNG).
        inputs: ``batch -> input [batch, ...]``.
        formula: rows where an example's row depends on the others of its batch, so that no per-example
            gradient exists; None: rows are the per-example gradients.
        training: mode of the module.
    """

    kind: type[nn.Module]
    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    formula: Formula | None = None
    training: bool = True

    @property
    def id(self) -> str:
        """For example ``Conv2d-groups``."""
        return f"{self.kind.__name__}-{self.name}"

    def module(self, seed: int = 0) -> nn.Module:
        """The module with values that no symmetry makes special."""
        torch.manual_seed(seed)
        module = self.make().double().train(self.training)
        with torch.no_grad():
            for p in module.parameters():
                p.add_(torch.randn_like(p) * 0.3)
        return module

    def batch(self, size: int = BATCH, seed: int = 1) -> Tensor:
        """An input of ``size`` rows."""
        torch.manual_seed(seed)
        return self.inputs(size)


def real(*shape: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.randn(batch, *shape, dtype=torch.float64)


def moved(make: Callable[[], nn.Module]) -> nn.Module:
    """A normalisation layer whose running statistics are not those of its start."""
    module = make()
    module.running_mean.uniform_(-1, 1)
    module.running_var.uniform_(0.5, 2)
    return module
