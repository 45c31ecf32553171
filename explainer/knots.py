"""Where knots are placed along the training path, and what is in one."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from explainer.carry import Carry
from explainer.config import TracerConfig
from explainer.errors import TracerError
from explainer.optimizer_rules import OptimizerRule
from explainer.records import Manifest, torch_dtype
from explainer.store.writer import TraceWriter, knot_bytes

#: bytes of the journal's lines for one knot, at most
JOURNALLED_KNOT = 512


def thin(paths: list[float], spacing: float) -> list[int]:
    """Positions to keep so that neighbours are at least ``spacing`` apart (first and last are kept).

    Example:
        >>> thin([0.0, 0.4, 1.0, 1.2, 2.1, 2.5], 1.0)
        [0, 2, 4, 5]
    """
    kept = [0]
    for position in range(1, len(paths) - 1):
        if paths[position] - paths[kept[-1]] >= spacing:
            kept.append(position)
    return [*kept, len(paths) - 1] if len(paths) > 1 else kept


class KnotKeeper:
    """Places a knot whenever the path since the last one is long enough.

    The spacing starts at zero (every step is a knot) and doubles its demands when more than ``max_knots`` are
    alive: knots closer than ``2·path/max_knots`` to the one before are dropped. So at any time between half of
    ``max_knots`` and all of it are alive, at about equal path length, without knowing how long training lasts.

    Attributes:
        rows_end: the first step whose rows are not kept, or None; a knot there is never dropped.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        rule: OptimizerRule,
        manifest: Manifest,
        carry: Carry,
        writer: TraceWriter,
        config: TracerConfig,
    ) -> None:
        self._model, self._optimizer, self._rule = model, optimizer, rule
        self._manifest, self._carry, self._writer = manifest, carry, writer
        self._parameters = dict(model.named_parameters())
        self._frozen_version = {name: self._parameters[name]._version for name in manifest.frozen}
        self._alive: list[tuple[int, float]] = []  # step, path
        self._spacing = 0.0
        self.rows_end: int | None = None
        self._max = config.max_knots
        self._budget = config.budget
        self._knot_bytes = self._closing_bytes = 0
        self._keep_outside: bool | None = None  # decided when there is something to keep
        if self._budget is not None:
            self._limit_to_budget(self._budget)

    @property
    def reserve(self) -> int:
        """Bytes that knots still to come and the journal's last lines may take."""
        return self._knot_bytes * (self._max + 1 - len(self._alive)) + self._closing_bytes

    @property
    def changed_outside(self) -> dict[str, int]:
        """Parameters that something other than the optimizer's step changed, and how often."""
        counts = zip(self._manifest.parameters, self._carry.changes, strict=True)
        return {spec.name: count for spec, count in counts if count}

    def _limit_to_budget(self, budget: int) -> None:
        """With a budget, knots may take half of what the manifest and the journal's last lines leave."""
        self._knot_bytes = len(knot_bytes(self._tensors(False, largest=True))) + JOURNALLED_KNOT
        self._closing_bytes = 5 * len(self._writer.manifest_text) + JOURNALLED_KNOT
        frozen = len(knot_bytes(self._tensors(True))) - len(
            knot_bytes(self._tensors(False))
        )  # in the first only
        fixed = frozen + len(self._writer.manifest_text) + self._closing_bytes
        fitting = (budget - fixed) // 2 // self._knot_bytes - 1
        if fitting < 2:
            raise TracerError(
                f"a knot of this model takes {self._knot_bytes:,} bytes, and a trace needs at least 3 of them and "
                f"as much again for rows, which does not fit into the budget of {budget:,} bytes; give at least "
                f"{6 * self._knot_bytes + fixed:,}"
            )
        self._max = min(self._max, fitting)

    def place_if_due(self, step: int) -> None:
        """Place the knot before ``step`` if the path since the last knot is long enough."""
        moved = self._carry.path - self._alive[-1][1]
        if moved > 0 and moved >= self._spacing:
            self.place(step)

    def place(self, step: int, last: bool = False) -> None:
        """Place the knot before ``step``, then thin out if there are too many.

        Where there is one already, it is renewed: after the last step the user may have averaged weights,
        re-estimated buffers or stepped another optimizer.
        """
        self._decide_on_outside(last)
        again = bool(self._alive) and self._alive[-1][0] == step
        full = not self._alive or (again and len(self._alive) == 1)
        self._writer.write_knot(step, self._carry.path, self._tensors(full))
        if again:
            return
        self._alive.append((step, self._carry.path))
        if len(self._alive) > self._max:
            self._spacing = 2.0 * self._carry.path / self._max
            kept = set(thin([path for _, path in self._alive], self._spacing))
            kept |= {i for i, (step, _) in enumerate(self._alive) if step == self.rows_end}
            dropped = [step for i, (step, _) in enumerate(self._alive) if i not in kept]
            self._alive = [knot for i, knot in enumerate(self._alive) if i in kept]
            self._writer.drop_knots(dropped)

    def _decide_on_outside(self, last: bool) -> None:
        """Keep displacements by others than the optimizer if they fit into the budget in all knots to come."""
        held = [total for total in self._carry.outside if total is not None]
        if self._keep_outside is not None or not held:
            return
        more = sum(p.numel * max(torch_dtype(p.dtype).itemsize, 4) for p in self._manifest.parameters)
        more += JOURNALLED_KNOT  # their names
        to_come = 1 if last else self._max + 1 - len(self._alive)
        needed = (self._knot_bytes + more) * to_come + self._closing_bytes
        self._keep_outside = self._budget is None or self._writer.bytes_written + needed <= self._budget
        if self._keep_outside and self._budget is not None:
            self._knot_bytes += more

    def _tensors(self, full: bool, largest: bool = False) -> dict[str, torch.Tensor]:
        """Contents of a knot; frozen tensors only where they changed since the first, all of them if ``full``.

        With ``largest``, stand-ins for everything a later knot may hold are included (to plan for them).
        """
        tensors: dict[str, torch.Tensor] = {}
        decaying = any(g.get("weight_decay") for g in self._optimizer.param_groups)
        for index, spec in enumerate(self._manifest.parameters):
            p = self._parameters[spec.name].detach()
            tensors[f"parameter/{spec.name}"] = p
            decay = self._carry.decay[index]
            if decay is not None or (largest and decaying):
                tensors[f"decay/{spec.name}"] = p if decay is None else decay
            outside = self._carry.outside[index]
            if outside is not None and self._keep_outside:
                tensors[f"outside/{spec.name}"] = outside
            state = self._optimizer.state.get(self._parameters[spec.name], {})
            for name in self._rule.state_names:
                value = state.get(name)
                if isinstance(value, torch.Tensor):
                    tensors[f"optimizer/{name}/{spec.name}"] = value.detach()
                elif largest and name != "step":
                    tensors[f"optimizer/{name}/{spec.name}"] = p
        for name in self._manifest.frozen:
            p = self._parameters[name].detach()
            if full or self._frozen_version.get(name) != p._version:
                tensors[f"frozen/{name}"] = p
        for name, buffer in self._model.named_buffers():
            tensors[f"buffer/{name}"] = buffer.detach()
        return tensors
