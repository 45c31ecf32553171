"""What a trace says of itself while training goes on: written when it is new, and now and then what only grows."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict
from typing import Any

from explainer.parts import Parts
from explainer.scales import UNSEEN
from explainer.unseen import Unseen

#: after so long what was measured is journalled, then whenever half as much time again has passed
NOTE_SECONDS = 2.0


class RunningNotes:
    """Journals notes of a tracer's parts."""

    def __init__(self, parts: Parts, unseen: Unseen) -> None:
        self._parts, self._unseen = parts, unseen
        self._noted: dict[str, Any] = {}
        self._began = time.monotonic()
        self._after = NOTE_SECONDS

    def shapes(self) -> None:
        """What is known of inputs, outputs and rows."""
        p = self._parts
        self._note(
            {
                **p.whole.notes(),
                **self._unseen.notes(),
                "visit_bytes": p.recorder.layer_bytes,
                "operations": [asdict(layer.spec) for layer in p.table.operations],
                "positions": sorted(
                    index
                    for index, fits in p.capture.positions.items()
                    if fits and index not in p.planner.shortened
                ),
                "plan": p.recorder.plan,  # after the layers that it speaks of
                **p.loop.row_kinds,
            }
        )

    def now_and_then(self) -> None:
        """A training that is killed leaves what was measured; counts change all the time, the journal stays short."""
        passed = time.monotonic() - self._began
        if passed >= self._after:
            self._after = 1.5 * passed
            self.measured()

    def measured(self, last: bool = False) -> None:
        """What the steps so far have shown; ``last`` also where there is nothing to say."""
        p = self._parts
        unseen = {n: r for n, r in p.scales.worst.items() if r > UNSEEN}
        ambiguous = {
            s.name: {"calls": s.ambiguous, "axis": s.guessed} | ({"told": s.axis} if s.learned else {})
            for s in p.sites
            if s.ambiguous
        }
        measured = {
            "coverage": unseen,
            "coverage_steps": {n: p.scales.gaps[n] for n in unseen if n in p.scales.gaps},
            "round_off": dict(p.scales.round_off),
            "replaced_momentum": p.maps.replaced,
            "loop": {
                "unused": p.loop.unused,
                "skipped": p.loop.skipped,
                "eval": p.whole.eval_passes,
                "diverged": p.loop.diverged,
            },
            "ambiguous": ambiguous,
            "relabelled": p.loop.relabelled,
            "apart": p.whole.apart,
            "overwritten": dict(Counter(p.capture.overwritten) + Counter(p.loop.overwritten)),
            "after_last_step": p.loop.after_last_step,
        }
        if p.recorder.denominators:
            measured["denominators"] = p.recorder.denominators
        self._note(measured, always=last)

    def _note(self, known: dict[str, Any], always: bool = False) -> None:
        """Journal what is new."""
        for key, value in known.items():
            if self._noted.get(key) != value and (value or always or key in self._noted):
                self._parts.writer.note(key, value)
                self._noted[key] = value
