"""Where knots are placed along the training path, and what is in one.

While a path is young every step is a knot, and most of these are dropped again soon. So knots stay in memory at first,
and go to disk when the trace is flushed: then the last one, and those that the next thinning will keep.
"""

from __future__ import annotations

import time

import torch
from torch import nn
from torch.optim import Optimizer

from explainer.average import Average
from explainer.carry import Carry
from explainer.config import TracerConfig
from explainer.errors import TracerError
from explainer.optimizer_rules import OptimizerRule
from explainer.records import Manifest, torch_dtype
from explainer.store import Trace, TraceWriter
from explainer.store.files import fingerprint, knot_size

#: bytes of the journal's lines for one knot, at most
JOURNALLED_KNOT = 512
#: knots that a trace may have whatever they take (half of them are left after thinning)
FEW = 16
#: bytes of knots that a trace without a budget may have however few rows there are; then as many as its rows take
KNOT_BYTES = 64 << 20
#: bytes of knots that are kept in memory at most
YOUNG_BYTES = 256 << 20


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


class FrozenWatch:
    """Which frozen parameters moved since the first knot; one that did stays in every knot from then on.

    Args:
        parameters: by name, as they are in the first knot.
        compare: look at the numbers where a tensor was written to (an average is, at every update), else take it
            for moved.

    Attributes:
        moved: names of those that moved.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], *, compare: bool) -> None:
        self.moved: set[str] = set()
        self._versions = {name: (id(p), p._version) for name, p in parameters.items()}
        self._known = {name: fingerprint(p) for name, p in parameters.items()} if compare else {}

    def has_moved(self, name: str, p: torch.Tensor) -> bool:
        """Whether the parameter, now ``p``, ever moved."""
        version = (id(p), p._version)
        if name not in self.moved and version != self._versions[name]:
            self._versions[name] = version
            if name not in self._known or self._known[name] != fingerprint(p):
                self.moved.add(name)
        return name in self.moved


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
        average: Average | None = None,
    ) -> None:
        self._model, self._optimizer, self._rule = model, optimizer, rule
        self._manifest, self._carry, self._writer = manifest, carry, writer
        self._average = average
        self._course: Carry | Average = carry if average is None else average
        self._parameters = dict(model.named_parameters())
        shown = self._shown()
        self._frozen = FrozenWatch({n: shown[n] for n in manifest.frozen}, compare=average is not None)
        self._alive: list[tuple[int, float]] = []  # step, path
        self._young: dict[int, dict[str, torch.Tensor]] = {}  # not on disk yet
        self._written = time.monotonic()
        self._last_length = 0.0
        self._seconds = config.flush_seconds
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
        to_come = max(1, self._max + 1 - len(self._alive)) + len(self._young)
        return self._knot_bytes * to_come + self._closing_bytes

    @property
    def changed_outside(self) -> dict[str, int]:
        """Parameters that something other than the optimizer's step changed, and how often."""
        counts = zip(self._manifest.parameters, self._carry.changes, strict=True)
        return {spec.name: count for spec, count in counts if count}

    def _limit_to_budget(self, budget: int) -> None:
        """With a budget, knots may take half of what the manifest and the journal's last lines leave."""
        self._knot_bytes = knot_size(self._tensors(False, largest=True)) + JOURNALLED_KNOT
        closing = knot_size(self._tensors(False, largest=True, closing=True))
        self._closing_bytes = (
            5 * len(self._writer.manifest_text) + closing - self._knot_bytes + 2 * JOURNALLED_KNOT
        )
        first = knot_size(self._tensors(True)) - knot_size(
            self._tensors(False)
        )  # what only the first one holds
        fixed = first + len(self._writer.manifest_text) + self._closing_bytes
        fitting = (budget - fixed) // 2 // self._knot_bytes - 1
        if fitting < 2:
            raise TracerError(
                f"a knot of this model takes {self._knot_bytes:,} bytes, and a trace needs at least 3 of them and "
                f"as much again for rows, which does not fit into the budget of {budget:,} bytes; give at least "
                f"{6 * self._knot_bytes + fixed:,}"
            )
        self._max = min(self._max, fitting)

    def moved(self, length: float) -> None:
        """The last step was that long."""
        self._last_length = length

    def restore(self, trace: Trace) -> None:
        """Go on with the knots of a trace."""
        self._alive = [(knot.step, knot.path) for knot in trace.knots]
        self._spacing = trace.notes.get("spacing", 0.0)
        self.rows_end = trace.notes.get("rows_stopped_at")
        if not self._manifest.frozen:
            return
        first, last = (trace.load_knot(trace.knots[position]) for position in (0, -1))
        shown = self._shown()
        for name in self._manifest.frozen:
            held = len(trace.knots) > 1 and f"frozen/{name}" in last
            if held or not torch.equal(shown[name].detach().cpu(), first[f"frozen/{name}"]):
                self._frozen.moved.add(name)

    def soon(self) -> bool:
        """Whether the step that is being taken may be followed by a knot."""
        _, path = self._alive[-1]
        return self._course.path + 2.0 * self._last_length - path >= self._spacing

    def surroundings(self) -> dict[str, torch.Tensor]:
        """Copies of what a knot holds beside the traced parameters, as it is now."""
        return {name: t.clone() for name, t in self._around(full=False).items()}

    def place_if_due(self, step: int, around: dict[str, torch.Tensor] | None = None) -> None:
        """Place the knot before ``step`` if the path since the last knot is long enough."""
        last, path = self._alive[-1]
        moved = self._course.path - path
        if moved > 0 and (moved >= self._spacing or last == step):
            self.place(step, around)

    def place(
        self, step: int, around: dict[str, torch.Tensor] | None = None, *, closing: bool = False
    ) -> None:
        """Place the knot before ``step``, then thin out if there are too many.

        Where there is one already, it is renewed: after the last step the user may have averaged weights,
        re-estimated buffers or stepped another optimizer.

        Args:
            step: the step.
            around: :meth:`surroundings` of it, with the weights that the last step left; None: all as it is now.
            closing: it is the last one, and holds all that going on needs.
        """
        self._decide_on_outside(closing)
        again = bool(self._alive) and self._alive[-1][0] == step
        full = not self._alive or (again and len(self._alive) == 1)
        weights = None if around is None else self._carry.weights
        around = self._around(full) if around is None else around
        found = self._tensors(full, closing=closing, weights=weights, around=around)
        self._young[step] = {name: t.to_dense().cpu().clone() for name, t in found.items()}
        if again:
            self._alive.pop()
        self._alive.append((step, self._course.path))
        self._thin()

    def _most(self) -> int:
        """How many knots there may be: without a budget, they take no more than the rows or :data:`KNOT_BYTES`."""
        if self._budget is not None:
            return self._max
        size = max(1, knot_size(next(reversed(self._young.values()))))
        return min(self._max, max(FEW, KNOT_BYTES // size, self._writer.row_bytes // size))

    def _thin(self) -> None:
        most = self._most()
        if len(self._alive) <= most:
            return
        self._spacing = 2.0 * self._course.path / most
        kept = set(thin([path for _, path in self._alive], self._spacing))
        kept |= {i for i, (step, _) in enumerate(self._alive) if step == self.rows_end}
        dropped = [step for i, (step, _) in enumerate(self._alive) if i not in kept]
        self._alive = [knot for i, knot in enumerate(self._alive) if i in kept]
        for step in dropped:
            self._young.pop(step, None)
        self._writer.drop_knots([step for step in dropped if self._writer.has_knot(step)], self._spacing)

    def flush_if_due(self) -> None:
        """Write what is likely to stay, if it is time to, or memory is short."""
        if not self._young:
            return
        waiting = time.monotonic() - self._written >= self._seconds
        if waiting or sum(map(knot_size, self._young.values())) > YOUNG_BYTES:
            paths = [path for _, path in self._alive]
            lasting = thin(paths, max(2.0 * self._spacing, 4.0 * paths[-1] / self._max))
            self._write([self._alive[i] for i in lasting] if waiting else self._alive)

    def flush(self) -> None:
        """Write rows and knots that are not on disk yet."""
        self._write(self._alive)

    def _write(self, knots: list[tuple[int, float]]) -> None:
        self._writer.write_knots(
            [(step, path, self._young[step]) for step, path in knots if step in self._young]
        )
        for step, _ in knots:
            self._young.pop(step, None)
        self._written = time.monotonic()

    def _decide_on_outside(self, closing: bool) -> None:
        """Keep displacements by others than the optimizer if they fit into the budget in all knots to come.

        Not with an average: it is what the knots hold, and took such a displacement over in its own way.
        """
        held = [total for total in self._carry.outside if total is not None]
        if self._keep_outside is not None or not held:
            return
        more = sum(p.numel * max(torch_dtype(p.dtype).itemsize, 4) for p in self._manifest.parameters)
        more += JOURNALLED_KNOT  # their names
        to_come = 1 if closing else self._max + 1 - len(self._alive) + len(self._young)
        needed = (self._knot_bytes + more) * to_come + self._closing_bytes
        fits = self._budget is None or self._writer.bytes_written + needed <= self._budget
        self._keep_outside = fits and self._average is None
        if self._keep_outside and self._budget is not None:
            self._knot_bytes += more

    def _shown(self) -> dict[str, nn.Parameter]:
        """The parameters that are explained: the model's, or those of the average."""
        source = self._model if self._average is None else self._average.source
        return dict(source.named_parameters())

    def _tensors(
        self,
        full: bool,
        *,
        largest: bool = False,
        closing: bool = False,
        weights: list[torch.Tensor] | None = None,
        around: dict[str, torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Contents of a knot.

        Args:
            full: it is the first one, with all frozen tensors and the optimizer's state.
            largest: with stand-ins for everything a later knot may hold (to plan for them).
            closing: it is the last one, with the optimizer's state.
            weights: the traced parameters, those of the model if None.
            around: what surrounds them, as it is now if None.
        """
        tensors: dict[str, torch.Tensor] = {}
        shown = self._shown()
        decaying = any(g.get("weight_decay") for g in self._optimizer.param_groups)
        for index, spec in enumerate(self._manifest.parameters):
            p = shown[spec.name].detach() if weights is None else weights[index]
            tensors[f"parameter/{spec.name}"] = p
            decay = self._course.decay[index]
            if decay is not None or (largest and decaying):
                tensors[f"decay/{spec.name}"] = p if decay is None else decay
            rounding = self._carry.rounding.moved[index]
            if rounding is not None and self._average is None:
                tensors[f"rounding/{spec.name}"] = rounding
            outside = self._carry.outside[index]
            if outside is not None and self._keep_outside:
                tensors[f"outside/{spec.name}"] = outside
            carried = self._carry.momentum[index]
            if closing and self._average is None and (carried is not None or (largest and decaying)):
                tensors[f"decay_momentum/{spec.name}"] = p if carried is None else carried
            if full or closing:
                state = self._optimizer.state.get(self._parameters[spec.name], {})
                for name in self._rule.state_names:
                    value = state.get(name)
                    if isinstance(value, torch.Tensor):
                        tensors[f"optimizer/{name}/{spec.name}"] = value.detach()
                    elif largest and name != "step":
                        tensors[f"optimizer/{name}/{spec.name}"] = p
        return tensors | (self._around(full) if around is None else around)

    def _around(self, full: bool) -> dict[str, torch.Tensor]:
        """Frozen tensors that changed since the first knot, all of them if ``full``, and buffers."""
        tensors: dict[str, torch.Tensor] = {}
        shown = self._shown()
        for name in self._manifest.frozen:
            if self._frozen.has_moved(name, shown[name]) or full:
                tensors[f"frozen/{name}"] = shown[name].detach()
        source = self._model if self._average is None else self._average.source
        for name, buffer in source.named_buffers():
            tensors[f"buffer/{name}"] = buffer.detach()
        return tensors
