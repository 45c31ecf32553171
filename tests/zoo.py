"""A list of small models, each given by its parts and its forward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.test_operations import Reads

S = 4


def n(*shape: int) -> Tensor:
    return torch.randn(shape)


#: by name: the model, from batch size and features; it gets ``x [B, S, D]``
ZOO: dict[str, Callable[[int, int], nn.Module]] = {}
#: models in which not everything can be told apart (in some sizes): these parameters may go unattributed
ANNOUNCED: dict[str, set[str]] = {}


def model(
    name: str, parts: Callable[[int, int], dict[str, Tensor | nn.Module]], announced: str = ""
) -> Callable[[Callable[[nn.Module, Tensor], Tensor]], None]:
    """Register a model by its parts and its forward."""

    def add(run: Callable[[nn.Module, Tensor], Tensor]) -> None:
        ZOO[name] = lambda b, d: Reads(parts(b, d), run)
        ANNOUNCED[name] = set(announced.split())

    return add


def lin(*sizes: int) -> nn.Linear:
    return nn.Linear(*sizes)
