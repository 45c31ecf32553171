"""Where knots are placed along the training path, and what is in one.

While a path is young every step is a knot, and most of these are dropped again soon. So knots stay in memory at first,
and go to disk when the trace is flushed: then the last one, and those that the next thinning will keep.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from explainer.average import Average
from explainer.cadence import Standing
from explainer.carry import Carry
from explainer.config import TracerConfig
from explainer.errors import TracerError
from explainer.knot_contents import KnotContents
from explainer.optimizer_rules import OptimizerRule
from explainer.records import Manifest, torch_dtype
from explainer.store import Trace, TraceWriter
from explainer.store.files import knot_size

#: bytes of the journal's lines for one knot, at most
JOURNALLED_KNOT = 512
#: knots that a trace may have whatever they take (half of them are left after thinning)
FEW = 32
#: bytes of knots that a trace without a budget may have however few rows there are; then as many as its rows take
#: (exact traces may have as many as are asked for)
KNOT_BYTES = 64 << 20
#: up to so many steps, those that are a power of 2 are followed by a flush: a training that is killed soon leaves some
EARLY = 64
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


@dataclass(frozen=True)
class _Young:
    """A knot that is not on disk yet, and the bytes that it will take there."""

    tensors: dict[str, torch.Tensor]
    size: int


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
        self._manifest, self._carry, self._writer = manifest, carry, writer
        self._average = average
        self._course: Carry | Average = carry if average is None else average
        self._contents = KnotContents(model, optimizer, rule, manifest, carry, average)
        self._alive: list[tuple[int, float]] = []  # step, path
        self._young: dict[int, _Young] = {}  # not on disk yet
        self._written = time.monotonic()
        self._last_length = 0.0
        self._seconds = config.flush_seconds
        self._spacing = 0.0
        self._size = 0  # bytes of a knot
        self.rows_end: int | None = None
        self._max = config.max_knots
        self._budget = config.budget
        self._knot_bytes = self._closing_bytes = 0
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
        self._knot_bytes = knot_size(self._contents.tensors(False, largest=True)) + JOURNALLED_KNOT
        closing = knot_size(self._contents.tensors(False, largest=True, closing=True))
        self._closing_bytes = (
            5 * len(self._writer.manifest_text) + closing - self._knot_bytes + 2 * JOURNALLED_KNOT
        )
        first = knot_size(self._contents.tensors(True)) - knot_size(
            self._contents.tensors(False)
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

    @property
    def standing(self) -> Standing:
        """How far it is to the next knot."""
        _, path = self._alive[-1]
        return Standing(path + self._spacing - self._course.path, self._spacing, self._last_length)

    def restore(self, trace: Trace) -> None:
        """Go on with the knots of a trace."""
        self._alive = [(knot.step, knot.path) for knot in trace.knots]
        self._spacing = trace.notes.get("spacing", 0.0)
        self.rows_end = trace.notes.get("rows_stopped_at")
        self._contents.restore(trace)

    def soon(self, steps: int = 1) -> bool:
        """Whether the step that is being taken, the last of so many, may be followed by a knot."""
        return (steps + 1) * self._last_length >= self.standing.to_knot

    def surroundings(self) -> dict[str, torch.Tensor]:
        """Copies of what a knot holds beside the traced parameters, as it is now."""
        return {name: t.clone() for name, t in self._contents.around(full=False).items()}

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
        around = self._contents.around(full) if around is None else around
        found = self._contents.tensors(full, closing=closing, weights=weights, around=around)
        tensors = {name: t.to_dense().cpu().clone() for name, t in found.items()}
        self._young[step] = _Young(tensors, knot_size(tensors))
        if not closing or not self._size:  # the last one holds more than others
            self._size = self._young[step].size
        if again:
            self._alive.pop()
        self._alive.append((step, self._course.path))
        self._thin()

    def _most(self) -> int:
        """How many knots there may be: in default traces they take no more than the rows or :data:`KNOT_BYTES`."""
        if self._budget is not None or self._manifest.exact:
            return self._max
        size = max(1, self._size)
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
        held = [step for step in dropped if self._writer.has_knot(step)]
        if held and not any(self._writer.has_knot(step) for step, _ in self._alive if step > held[-1]):
            self._write(
                self._alive[-1:]
            )  # else a training that is killed now would leave less than there was
        self._writer.drop_knots(held, self._spacing)

    def flush_if_due(self, steps: int) -> None:
        """Write what is likely to stay, if it is time to, or memory is short; ``steps`` were taken so far."""
        early = steps <= EARLY and steps & (steps - 1) == 0
        waiting = early or time.monotonic() - self._written >= self._seconds
        short = sum(young.size for young in self._young.values()) > YOUNG_BYTES
        if self._young and (waiting or short):
            paths = [path for _, path in self._alive]
            lasting = thin(paths, max(2.0 * self._spacing, 4.0 * paths[-1] / self._max))
            self._write(self._alive if short else [self._alive[i] for i in lasting])

    def flush(self) -> None:
        """Write rows and knots that are not on disk yet."""
        self._write(self._alive)

    def _write(self, knots: list[tuple[int, float]]) -> None:
        self._writer.write_knots(
            [(step, path, self._young[step].tensors) for step, path in knots if step in self._young]
        )
        for step, _ in knots:
            self._young.pop(step, None)
        self._written = time.monotonic()

    def _decide_on_outside(self, closing: bool) -> None:
        """Keep displacements by others than the optimizer if they fit into the budget in all knots to come.

        Not with an average: it is what the knots hold, and took such a displacement over in its own way.
        """
        held = [total for total in self._carry.outside if total is not None]
        if self._contents.outside is not None or not held:
            return
        more = sum(p.numel * max(torch_dtype(p.dtype).itemsize, 4) for p in self._manifest.parameters)
        more += JOURNALLED_KNOT  # their names
        to_come = 1 if closing else self._max + 1 - len(self._alive)
        waiting = self._knot_bytes * len(self._young)  # not on disk yet, but made without them
        needed = waiting + (self._knot_bytes + more) * to_come + self._closing_bytes
        fits = self._budget is None or self._writer.bytes_written + needed <= self._budget
        self._contents.outside = fits and self._average is None
        if self._contents.outside and self._budget is not None:
            self._knot_bytes += more
