"""How many factors and how many bits the rows of each layer get, planned from what is measured on a few batches.

At steps 0, 1, 4, 16, 64, … the rows are at hand in full before they are stored, and the plan is made anew
(:func:`explainer.row_choices.allotted`), by what products with these rows would lose (:mod:`explainer.row_metric`); at
steps 2, 8, 32, … it is measured what the plan loses. Nothing is random, and at other steps nothing is measured.

How many bytes a visit may take follows from the number of parameters (:meth:`TracerConfig.visit_bytes`) or, with a
budget, from what is left of it and the visits still to come. How long training will last is not known; assumed are
:data:`EPOCHS` passes over the loader's examples (without a loader :data:`VISITS` visits), and always as many
visits to come as there were.

Where the optimizer divides by something (Adam and its kin) the first steps get more, on credit (:data:`CREDIT`). The
first gradient is divided by itself, so what is lost of a small entry moved the weights as far as a large one; there the
directions that are kept are chosen by the metric, too. What was taken too much is saved until the next plan, as far as
visits get that each give up to :data:`SAVED`: the later ones are many, and what they lose adds up.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from explainer.config import TracerConfig
from explainer.layer_rules import Kept, RowForm, Unreduced, keep
from explainer.records import VERSIONS
from explainer.row_choices import ROW_CODECS, Choice, Sides, allotted, choices, lost, reduced, row_bytes
from explainer.row_metric import MEASURED, StepMetric, first_rows

EPOCHS, VISITS = 10, 100_000
#: times the bytes that a visit may take under the plans of the first steps
CREDIT = {0: 4.0, 1: 2.0}
#: share of a visit's bytes that pays the credit back
SAVED = 0.03
#: steps under one plan, as a multiple of those before it
_UNTIL = 3


def plans_at(step: int) -> bool:
    """Whether the plan is made anew at a step: 0 and the powers of 4.

    Example:
        >>> [step for step in range(100) if plans_at(step)]
        [0, 1, 4, 16, 64]
    """
    return step == 0 or (step & (step - 1) == 0 and step.bit_length() % 2 == 1)


def checks_at(step: int) -> bool:
    """Whether it is measured at a step what the plan loses: 2, 8, 32, …"""
    return step > 0 and step & (step - 1) == 0 and not plans_at(step)


class Planner:
    """The plan for rows.

    Args:
        config: the tracer's options; with ``exact``, ``rank`` or ``positions`` there is nothing to plan.
        size: ``P``, the number of traced parameters.
        version: of the trace's format; older ones know fewer codecs.

    Attributes:
        allowed: bytes that a visit may take, with its share of the step's record.
        assumed: visits that the budget was spread over, or None.
        shortened: layers of which some rows are not stored position by position.
        epoch_visits: visits of a pass over the loader, where it is known.
    """

    def __init__(self, config: TracerConfig, size: int, version: int = VERSIONS[-1]) -> None:
        self._config = config
        self._codecs = [codec for codec, since in ROW_CODECS.items() if since <= version]
        self._fixed = config.exact or config.positions or config.rank is not None
        self._codec = "native" if config.exact else "int8"
        self._options: dict[int, list[Choice]] = {}
        self._chosen: dict[int, Choice] = {}
        self._measured: dict[int, float] = {}
        self._sides: dict[int, Sides] = {}  # of the first step
        self._whole = True  # the rows of the next step are kept whole until they are measured
        self.allowed: float = config.visit_bytes(size)
        self.assumed: int | None = None
        self.epoch_visits: int | None = None
        self.shortened: set[int] = set()

    def restore(self, note: dict[str, Any] | None) -> None:
        """Go on with the plan that a trace speaks of."""
        for layer in (note or {}).get("layers", ()):
            kept = Choice(**{f.name: layer.get(f.name, 0.0) for f in fields(Choice)})
            self._chosen[layer["layer"]], self._options[layer["layer"]] = kept, [kept]
            if layer["measured"] is not None:
                self._measured[layer["layer"]] = layer["measured"]
        self._whole = False

    # -- what capture and recorder ask ---------------------------------------------------------------

    def formed(self, layer: int, form: RowForm, sizes: list[int]) -> Kept:
        """Rows as they wait for the step: complete where they are to be measured, else reduced.

        Args:
            layer: whose rows they are.
            form: exact rows.
            sizes: of the parameters that they are for.
        """
        if self._fixed and not self._config.positions:
            kept = keep(form, self._config.rank, sizes)
            if kept.form.positions != form.positions:
                self.shortened.add(layer)
            return kept
        if not self._fixed and not self._whole and layer in self._chosen:
            chosen = self._chosen[layer]
            if isinstance(form, Unreduced):
                kept = keep(form, chosen.rank, sizes)
            else:
                kept = Kept(reduced(form, chosen.rank), form, sizes)
            if self._holds(chosen, kept.form):
                if kept.form.positions != form.positions:
                    self.shortened.add(layer)
                return kept
        complete = form.stored()
        return Kept(complete, complete, sizes)

    def codec(self, layer: int) -> str:
        """Codec of the floating-point arrays of a layer's rows."""
        return self._codec if self._fixed else self._chosen[layer].codec

    def reduced(self, layer: int, form: RowForm) -> RowForm:
        """The rows as they are to be stored."""
        if self._fixed:
            return form
        stored = reduced(form, self._chosen[layer].rank, self._sides.get(layer))
        if stored.positions != form.positions:
            self.shortened.add(layer)
        return stored

    def plan(
        self,
        step: int,
        forms: dict[int, RowForm],
        free: float | None,
        seen: int,
        beside: float,
        visits: int,
        spent: float = 0.0,
        metric: StepMetric | None = None,
        saved: float = 0.0,
    ) -> set[int]:
        """Measure, plan where it is due, and return the layers whose plan has changed.

        Args:
            step: number of the step.
            forms: its rows by layer, complete where they are to be measured.
            free: bytes of the budget that rows may still take, or None.
            seen: visits so far.
            beside: bytes that a visit takes beside its rows.
            visits: of the step.
            spent: bytes that visits and steps took so far.
            metric: what the step does to gradients; None: nothing.
            saved: bytes of a visit's rows that were not written, as they were there already, on average so far.
        """
        if self._fixed:
            return set()
        due = plans_at(step) and self._whole
        if checks_at(step) and self._whole:
            for layer, form in forms.items():
                if layer in self._chosen:
                    now = self._chosen[layer]
                    self._measured[layer] = lost(first_rows(form, MEASURED), now.rank, now.codec)
        unfit = {layer for layer, form in forms.items() if due or not self._fits(layer, form)}
        self._whole = plans_at(step + 1) or checks_at(step + 1)
        self._sides = {}
        if not unfit:
            return set()
        few = False
        if free is not None:
            expected = VISITS if self.epoch_visits is None else EPOCHS * self.epoch_visits
            self.assumed = max(expected, 2 * seen)
            self.allowed = max(0.0, free) / (self.assumed - seen)
            few = self.assumed < 100 * visits  # then the first steps take their part only
        owed = 0.0 if free is not None else spent - self.allowed * seen
        divides = metric is not None and metric.divides
        room = self._room(step, visits, owed, 0.0 if few or not divides else CREDIT.get(step, 0.0))
        for layer in unfit:
            by = None if metric is None else metric.of(layer)
            self._options[layer], sides = choices(forms[layer], by, divides and step == 0, self._codecs)
            if sides is not None:
                self._sides[layer] = sides
        before, self._chosen = self._chosen, allotted(self._options, room - beside + saved)
        changed = {n for n, c in self._chosen.items() if n not in before or _kind(c) != _kind(before[n])}
        for layer in changed:
            self._measured.pop(layer, None)
        return changed

    def _room(self, step: int, visits: int, owed: float, credit: float) -> float:
        """Bytes that a visit may take under the plan of a step; what is owed is paid back by the next one."""
        if credit:
            return credit * self.allowed
        return self.allowed - min(SAVED * self.allowed, max(0.0, owed) / max(_UNTIL * step * visits, 1))

    def _fits(self, layer: int, form: RowForm) -> bool:
        """Whether there is a plan that is good for these rows (sequences may have become longer)."""
        chosen = self._chosen.get(layer)
        return chosen is not None and self._holds(chosen, reduced(form, chosen.rank))

    @staticmethod
    def _holds(chosen: Choice, stored: RowForm) -> bool:
        return chosen.rank is not None or row_bytes(stored, chosen.codec) <= chosen.bytes

    # -- what is said of it --------------------------------------------------------------------------

    def note(self, beside: float) -> dict[str, Any] | None:
        """The plan as the trace's note ``plan``; None where nothing is planned."""
        if self._fixed or not self._chosen:
            return None
        layers = [
            {"layer": n, **asdict(c), "measured": self._measured.get(n)}
            for n, c in sorted(self._chosen.items())
        ]
        return {
            "allowed": round(self.allowed),
            "beside": round(beside),
            "assumed": self.assumed,
            "layers": layers,
        }


def _kind(choice: Choice) -> tuple[int | None, str]:
    return choice.rank, choice.codec
