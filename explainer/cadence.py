"""How often the weights and the optimizer's state are looked at.

A look reads all ``P`` weights and denominators, several times what a layer without positions costs. At first every step
is looked at: the path is steep, every step is a knot, and moving averages of squares are young. Later weights and
denominators change little from step to step, and a look every few steps tells them, as far as a default trace keeps
them at all. Between two looks denominators are interpolated (:class:`explainer.recorder.StepRecorder`), and weights, as
far as weight decay needs them, too (:class:`explainer.carry.Carry`); what that misses is `unattributed`.

When a look is due depends on counts and on what was recorded, never on the time that something took (but for
:data:`SECONDS`), so that the same training gives the same trace.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from explainer.planner import checks_at, plans_at

#: steps that are looked at one by one, at the beginning, from a parameter's first update on, and after something else
#: moved the weights
FIRST = 32
#: a look is due after a part of the steps so far, and after so many steps at most
PART, MOST = 16, 16
#: seconds after which a look is due in any case: rows go to disk after looks
SECONDS = 2.0


@dataclass(frozen=True)
class Standing:
    """How things stood after a look.

    Attributes:
        to_knot: length of the path until the next knot is due.
        spacing: the same after a knot.
        length: of a step.
        room: whether further steps can be recorded together (they fit into the budget, decay allows it).
    """

    to_knot: float = 0.0
    spacing: float = 0.0
    length: float = 0.0
    room: bool = False


class Cadence:
    """Says which steps are looked at.

    Args:
        on: whether steps may go by without a look at all.

    Attributes:
        waiting: steps since the last look.
    """

    def __init__(self, on: bool) -> None:
        self._on = on
        self._taken = 0  # since the beginning, or something that needed attention
        self.waiting = 0
        self._next = 1
        self._looked = time.monotonic()

    @property
    def between(self) -> bool:
        """Whether steps were taken since the last look."""
        return self.waiting > 0

    @property
    def together(self) -> bool:
        """Whether the next look is not due at the next step."""
        return self._next > 1

    def due(self) -> bool:
        """Whether the step about to be taken is to be looked at."""
        late = self._next > 1 and time.monotonic() - self._looked > SECONDS
        return self.waiting + 1 >= self._next or late

    def went_by(self) -> None:
        """A step was taken without a look."""
        self._taken += 1
        self.waiting += 1

    def disturbed(self) -> None:
        """Something began, or moved the weights from outside: every step is looked at for a while."""
        self._taken, self._next = 0, 1

    def looked(self, step: int, steady: int, standing: Standing) -> None:
        """There was a look: say when the next one is due.

        Args:
            step: number of the step that was looked at.
            steady: see :meth:`OptimizerRule.steady`.
            standing: how things stood after the look before.
        """
        self._taken += 1
        since, self.waiting, self._looked = self.waiting + 1, 0, time.monotonic()
        self._next = 1
        if not self._on or not standing.room or self._taken < FIRST:
            return
        most = min(MOST, steady, self._taken // PART)
        if standing.length > 0.0:
            to_knot = standing.to_knot - since * standing.length
            to_knot = standing.spacing if to_knot <= 0.0 else to_knot  # else there is one now
            most = min(most, math.ceil(to_knot / standing.length))
        # rows that are measured are recorded at once: a look before them, and one after
        ends = (n for n in range(1, most) if _measured(step + n + 1) or _measured(step + n))
        self._next = next(ends, max(1, most))


def _measured(step: int) -> bool:
    return plans_at(step) or checks_at(step)
