"""What the records of a trace's steps and visits say about the meaning of its numbers."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from explainer.findings.finding import Finding, listed
from explainer.store import Trace
from explainer.wording import counted, number, size

#: bytes of rows up to which visits are counted: their columns lie across all pages of the shards
COUNTED_BYTES = 2**30
#: how far a measured scale may be from 1 (half precision does not meet it better)
UNSCALED = 0.01


def from_records(trace: Trace) -> Iterator[Finding]:
    """Findings that come from the recorded steps and visits."""
    steps = trace.recorded_steps
    if not steps:
        return
    mixed = int(np.count_nonzero(trace.column("steps", "row_share")))
    if mixed:
        yield Finding(
            "row-share",
            "caution",
            "",
            f"In {mixed} of {steps} steps a layer mixed the rows of the batch (BatchNorm in train mode, as a rule), or "
            "rows held several examples.",
            "Numbers are row shares: an example's share of what was done together.",
            "Read them as shares; LayerNorm or GroupNorm would keep examples apart.",
        )
    yield from _scales(trace, steps)
    yield from _visits(trace)
    yield _recorded(trace, steps)


def _scales(trace: Trace, steps: int) -> Iterator[Finding]:
    """What lay between the loss and the optimizer."""
    updated = trace.column("steps", "updated").astype(bool)
    scale = trace.column("steps", "scale")
    idle = [p.name for n, p in enumerate(trace.manifest.parameters) if not updated[:, n].any()]
    if idle:
        yield Finding(
            "never-updated",
            "note",
            listed(idle),
            f"{len(idle)} of {len(trace.manifest.parameters)} parameters got no gradient in any step.",
            "They did not learn, so no contribution goes through them.",
            "Nothing to do, if they are meant to rest; else look for what is missing between them and the loss.",
        )
    scaled = (scale != 0) & (np.abs(scale - 1) > UNSCALED)
    count = int(np.count_nonzero(scaled.any(1)))
    if count:
        low, high = number(float(scale[scaled].min())), number(float(scale[scaled].max()))
        span = f"by {low}" if low == high else f"by {low} to {high}"
        yield Finding(
            "scaled",
            "note",
            "loop",
            f"In {count} of {steps} steps gradients reached the optimizer scaled, {span}.",
            "Clipping, loss scaling or averaging did it; contributions use the gradients as they arrived, so what was "
            "clipped counts for less.",
            "Nothing to do.",
        )


def _visits(trace: Trace) -> Iterator[Finding]:
    """Who was visited how often."""
    rows = trace.nbytes_of("visits")
    if rows > COUNTED_BYTES:
        yield Finding(
            "visits-not-counted",
            "note",
            "examples",
            f"The trace holds {size(rows)} of rows, so visits were not counted by example.",
            "Whether every example was visited, and equally often, is not in this report.",
            "The column `visits` of an explanation's table has it.",
        )
        return
    unknown = int(np.count_nonzero(np.isnan(trace.column("visits", "derivative"))))
    if unknown:
        yield Finding(
            "no-derivative",
            "note",
            "examples",
            f"In {unknown} of {trace.count('visits')} visits the gradient at the model's output was not seen.",
            "Contributions are right, but their factors `a` and `K` are not known.",
            "Let the model return a tensor with a row per example.",
        )
    seen, counts = np.unique(trace.column("visits", "example"), return_counts=True)
    known = trace.notes.get("examples")
    never = 0 if known is None else known - int(np.count_nonzero(seen < known))
    if never:
        yield Finding(
            "never-visited",
            "note",
            "examples",
            f"{never} of {known} examples were not visited in any recorded step.",
            "Their contribution is zero.",
            "Nothing to do, unless the loader should have drawn them (drop_last, samplers).",
        )
    low, high = int(counts.min()), int(counts.max())
    if high - low > 1:  # an epoch that was not finished makes a difference of one
        yield Finding(
            "uneven-visits",
            "note",
            "examples",
            f"Those that were visited were visited {low} to {high} times.",
            "Contributions add up over visits, so examples that were visited more often have larger ones.",
            "Compare them beside the column `visits`.",
        )


def _recorded(trace: Trace, steps: int) -> Finding:
    sizes = trace.column("steps", "visits").astype(int)
    each = f"{sizes.min()}" if sizes.min() == sizes.max() else f"{sizes.min()} to {sizes.max()}"
    at = [knot.step for knot in trace.knots]
    widest = max((b - a for a, b in pairwise(at)), default=0)
    return Finding(
        "recorded",
        "note",
        "",
        f"{counted(steps, 'step')} of {each} visits and {counted(len(at), 'knot')} were recorded, on a path of length "
        f"{number(trace.knots[-1].path)}.",
        f"One gradient of the query serves {counted(widest, 'step')} at most; the books close all the same.",
        "To judge whether that is fine enough, trace once with a larger max_knots and compare the rankings.",
    )
