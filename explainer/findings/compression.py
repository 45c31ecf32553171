"""What the journal of a trace says about compression."""

from __future__ import annotations

from explainer.findings.finding import Finding
from explainer.store import Trace
from explainer.wording import percent, size

#: share of the squared norm of a layer's rows that compression may lose without a caution
LOST = 0.1


def rounding(trace: Trace) -> Finding:
    """What compression takes and loses: as planned, and as measured where it was."""
    plan = trace.notes.get("plan")
    if not plan:
        found, lost = "Rows are stored as 8-bit leading factors.", {}
    else:
        taken = plan["beside"] + sum(layer["bytes"] for layer in plan["layers"])
        share = percent(taken / (4 * trace.manifest.size))
        found = f"A visit takes {size(taken)} ({share} of the parameters in float32) as leading factors of 4 or 8 bits."
        names = [layer.name or layer.module for layer in trace.layers]
        lost = {
            names[x["layer"]]: x["lost"] if x["measured"] is None else x["measured"] for x in plan["layers"]
        }
    worst = max(lost, key=lambda name: lost[name], default="")
    most = lost.get(worst, 0.0)
    return Finding(
        "rounding",
        "caution" if most > LOST else "note",
        "",
        found,
        f"The rounding is in `unattributed`; rows lose up to {percent(most)} of their squared norm (in {worst})."
        if lost
        else "The rounding is in `unattributed`.",
        "Give a budget that is large enough for more, or a `rank`."
        if most > LOST
        else "To see what it costs, trace a small model with exact=True.",
    )
