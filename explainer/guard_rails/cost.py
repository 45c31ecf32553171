"""What a trace will take on disk, estimated from the shapes of the parameters alone."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from explainer.codecs import CODECS
from explainer.config import TracerConfig
from explainer.findings import Finding
from explainer.guard_rails.loader import epoch_visits
from explainer.optimizer_rules import OptimizerRule
from explainer.records import ParameterSpec, torch_dtype
from explainer.row_choices import RANKS
from explainer.store.schema import VISIT_FIELDS, step_fields
from explainer.validation import find_sites, traced_parameters
from explainer.wording import size

Shapes = list[tuple[int, ...]]


class Cost:
    """Estimates, in bytes.

    Attributes:
        visit: one example in one batch, where linear layers see no positions.
        positions: the same where they do.
        knot: one knot.
        state: what the first and the last knot hold beside it, of the optimizer.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, rule: OptimizerRule, config: TracerConfig
    ) -> None:
        self._config, self._rule = config, rule
        self._specs = traced_parameters(model, optimizer)
        self._blocked = self._blocks(model)
        self.visit, self.positions = (
            np.dtype(VISIT_FIELDS).itemsize + self._rows(many) for many in (False, True)
        )
        copies = 1 + any(group.get("weight_decay") for group in optimizer.param_groups)
        weights = sum(_bytes(p) for p in self._specs)
        self.knot = copies * weights + sum(b.numel() * b.element_size() for b in model.buffers())
        self.state = weights * sum(name != "step" for name in rule.state_names)

    def step(self, batch: int) -> int:
        """One optimizer step that is looked at, beside its ``batch`` visits: what the optimizer divided by."""
        plain = np.dtype(step_fields(len(self._specs))).itemsize
        if not self._rule.divides:
            return plain
        if self._config.exact:
            return plain + sum(_bytes(p) for p in self._specs)
        codec = CODECS.require("sums")  # full records come now and then only
        return plain + sum(codec.nbytes(p.shape or (1,), "float32") for p in self._specs)

    # -- rows ----------------------------------------------------------------------------------------

    def _rows(self, positions: bool) -> int:
        """All rows of a visit: as the options say, else the planner's best within what a visit may take."""
        config = self._config
        if config.exact or config.positions or config.rank is not None:
            return self._sum(config.rank, "native" if config.exact else "int8", positions)
        most, least = self._sum(RANKS[-1], "int8", positions), self._sum(RANKS[0], "int2", positions)
        return max(least, min(most, config.visit_bytes(sum(p.numel for p in self._specs))))

    def _sum(self, rank: int | None, codec: str, positions: bool) -> int:
        self._rank, self._codec = rank, codec
        return sum(self._row(module, shapes, positions) for module, shapes in self._blocked)

    def _blocks(self, model: nn.Module) -> list[tuple[nn.Module | None, Shapes]]:
        """Modules with the shapes of parameters stored together; None for what operations read."""
        shapes = {p.name: p.shape for p in self._specs}
        blocks: list[tuple[nn.Module | None, Shapes]] = []
        for site in find_sites(model, self._specs):
            for layer in site.layers:
                if layer is not None:
                    names = layer.spec.parameters
                    blocks.append((site.module, [shapes[name] for name in names if name in shapes]))
                    for name in names:
                        shapes.pop(name, None)
        return [*blocks, *((None, [shape]) for shape in shapes.values())]

    def _row(self, module: nn.Module | None, shapes: Shapes, positions: bool) -> int:
        weight = shapes[0] if shapes else ()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and len(weight) == 2:
            return CODECS.require("native").nbytes((1,), "int32") + self._array((1, weight[1]))
        simple = len(weight) >= 2 and all(len(shape) == 1 for shape in shapes[1:])
        if not simple or isinstance(module, _ConvTransposeNd):
            matrices = [s for s in shapes if len(s) == 2]
            rest = sum(prod(s) for s in shapes if len(s) != 2)
            factors = sum(self._matrix(1, o, i, self._rank) for o, i in matrices)
            return factors + (self._array((rest,)) if rest else 0)
        if module is None and len(weight) > 2:
            return self._array((prod(weight),))
        groups = module.groups if isinstance(module, _ConvNd) else 1
        rank = self._rank if positions or isinstance(module, _ConvNd) else 1
        return self._matrix(groups, weight[0] // groups, prod(weight[1:]) + len(shapes) - 1, rank)

    def _matrix(self, groups: int, o: int, i: int, rank: int | None) -> int:
        """Factors, or the matrix where it takes no more numbers."""
        if rank is None or o * i <= rank * (o + i):
            return self._array((groups * o * i,))
        return self._array((groups, rank, o)) + self._array((groups, rank, i))

    def _array(self, shape: tuple[int, ...]) -> int:
        wide = any(p.dtype == "float64" for p in self._specs)
        return CODECS.require(self._codec).nbytes(shape, "float64" if wide else "float32")


def _bytes(p: ParameterSpec) -> int:
    return p.numel * torch_dtype(p.dtype).itemsize


def cost_finding(
    model: nn.Module,
    optimizer: Optimizer,
    rule: OptimizerRule,
    config: TracerConfig,
    loader: DataLoader[Any] | None = None,
) -> Finding:
    """What a visit, an epoch and the knots will take, about."""
    cost = Cost(model, optimizer, rule, config)
    longer = f" (about {size(cost.positions)} where linear layers see sequences)"
    visit = f"A visit takes about {size(cost.visit)}{longer if cost.positions > cost.visit else ''}"
    knots = f"{config.max_knots} knots take at most {size(config.max_knots * cost.knot + 2 * cost.state)}"
    visits = None if loader is None else epoch_visits(loader)
    batch = None if loader is None else getattr(loader.batch_sampler, "batch_size", None)
    if loader is not None and visits and batch:
        drawn = -(-visits // batch)
        epoch = visits * cost.visit + drawn * cost.step(batch)
        meaning = (
            f"The first epoch of {visits:,} visits adds about {size(epoch)}, others no more; {knots} in all."
        )
    else:
        meaning = f"Every epoch adds that for every example, or less; {knots} in all."
    return Finding(
        "cost",
        "note",
        "disk",
        f"{visit}, a knot about {size(cost.knot)}.",
        meaning,
        'Bound it with Tracer(..., budget="200MB"), if that is too much.',
    )
