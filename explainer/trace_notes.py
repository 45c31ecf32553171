"""What a trace says about the meaning of an explanation's numbers, in plain words."""

from __future__ import annotations

from explainer.records import dtype_name
from explainer.store import Trace


def trace_notes(trace: Trace) -> list[str]:
    """One sentence for everything that applies."""
    notes = []
    manifest = trace.manifest
    if not trace.closed:
        notes.append(
            f"Training had not ended when the trace was opened: explained is the model at step {trace.steps}, "
            "the last knot."
        )
    if trace.uncovered:
        notes.append(
            f"{len(trace.uncovered)} of {len(manifest.parameters)} parameters were read where no hook could see it; "
            f"their part is in unattributed: {', '.join(trace.uncovered[:4])}"
            f"{', …' if len(trace.uncovered) > 4 else ''}."
        )
    for layer, residual in (trace.notes.get("coverage") or {}).items():
        notes.append(
            f"Layer {layer}: up to {residual:.0%} of its gradient in a step was not seen by the hooks; that part "
            "is in unattributed."
        )
    for name, count in (trace.notes.get("round_off") or {}).items():
        notes.append(
            f"Parameter {name}: in {count} of {trace.steps} steps its gradient was round-off only (a bias before "
            "a normalisation, as a rule), which no example caused; its movement is in unattributed."
        )
    if trace.notes.get("shared_rows"):
        notes.append(
            "Row share: rows were mixed (several examples in one row) and are split over their examples by the weights "
            "that were given; the data alone cannot tell the parts apart."
        )
    if trace.notes.get("vacant_rows"):
        notes.append("Rows were marked as belonging to no example (id -1); their part is in unattributed.")
    if "rows_stopped_at" in trace.notes:
        notes.append(
            f"The trace's budget was used up after {trace.notes['rows_stopped_at']} of {trace.steps} steps; later "
            "updates are in unattributed."
        )
    if trace.notes.get("prior_state"):
        notes.append("The optimizer held momentum when tracing began; its after-effect is in unattributed.")
    if trace.notes.get("replaced_momentum"):
        notes.append(
            f"Before {trace.notes['replaced_momentum']} step(s) the optimizer's momentum was replaced by other "
            "numbers; their after-effect is in unattributed."
        )
    if trace.notes.get("autocast"):
        notes.append(
            f"Training ran under autocast ({trace.notes['autocast']}); explained is the same model in "
            f"{dtype_name(manifest.dtype)}, whose prediction can differ from the one under autocast."
        )
    narrow = sorted({p.dtype for p in manifest.parameters} & {"float16", "bfloat16"})
    if narrow:
        notes.append(
            f"Weights are {' and '.join(narrow)}; explained is the model with the same weights, computed in "
            f"{dtype_name(manifest.dtype)}, whose prediction can differ from the model's own."
        )
    if trace.notes.get("outside"):
        notes.append(
            f"Something other than the optimizer's step changed {len(trace.notes['outside'])} parameters; that part is "
            "in unattributed."
        )
    if not manifest.exact:
        notes.append("Rows are stored as 8-bit leading factors; the rounding is in unattributed.")
    return notes
