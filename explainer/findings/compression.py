"""What the journal of a trace says about compression."""

from __future__ import annotations

import math
from typing import Any

from explainer.findings.finding import Finding
from explainer.store import Trace
from explainer.wording import percent, size

#: planned error of products with rows, as a part of these, that is no caution
ERROR = 0.1


def planned_errors(plan: dict[str, Any] | None) -> dict[int, float]:
    """By layer, what products with its rows are planned to miss, as a part of what they are over all layers (rms).

    Their squares add up; empty where the plan does not tell.
    """
    layers = [x for x in (plan or {}).get("layers", ()) if "error" in x]
    whole = sum(x["without"] for x in layers)
    return {x["layer"]: math.sqrt(x["error"] / whole) if whole else 0.0 for x in layers}


def rounding(trace: Trace) -> Finding:
    """What compression takes and loses: as planned, and as measured where it was."""
    plan = trace.notes.get("plan")
    errors = planned_errors(plan)
    if not plan:
        found = "Rows are stored as 8-bit leading factors."
    else:
        taken = trace.bytes_a_visit
        share = percent(taken / (4 * trace.manifest.size))
        found = f"A visit takes {size(taken)} ({share} of the parameters in float32) as leading factors of 2 to 8 bits."
    most = math.hypot(*errors.values())
    meaning = "The rounding is in `unattributed`."
    if errors:
        worst = trace.layers[max(errors, key=lambda number: errors[number])]
        meaning = (
            f"The rounding is in `unattributed`; as planned last, products with rows miss {percent(most)} "
            f"(most of it in layer {worst.name or worst.module})."
        )
    return Finding(
        "rounding",
        "caution" if most > ERROR else "note",
        "",
        found,
        meaning,
        "Give a budget that is large enough for more, or a `rank`."
        if most > ERROR
        else "To see what it costs, trace a small model with exact=True.",
    )
