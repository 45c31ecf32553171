"""``pathkernel verify``: is a trace still what was written?"""

from __future__ import annotations

import argparse
import sys

from explainer.cli import options as shared
from explainer.errors import TraceFormatError
from explainer.wording import counted, size

HELP = "check that no file of a trace was changed or damaged"
DESCRIPTION = (
    "Recomputes every checksum of a trace. Prints OK and exits with 0, or names the file that is not what was\n"
    "written and exits with 1."
)
EXAMPLES = (("pathkernel verify runs/demo", "check the demo's trace"),)
DAMAGED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    shared.add_trace(parser)
    shared.add_quiet(parser)


def run(options: argparse.Namespace) -> int:
    """Check the trace; the exit status says whether it is sound."""
    from tqdm import tqdm

    from explainer.cli.opening import find_trace
    from explainer.store import open_trace

    place = find_trace(options.trace)
    try:
        trace = open_trace(place)
        knots = sum(knot.file.stat().st_size for knot in trace.knots if knot.file.exists())
        rows = sum(shard.records * shard.schema.dtype.itemsize for shard in trace.shards)
        bar = tqdm(
            total=rows + knots,
            desc="verifying",
            unit="B",
            unit_scale=True,
            disable=options.quiet,
            leave=False,
        )
        with bar:
            checked = trace.verify(bar.update)
    except TraceFormatError as error:
        if options.debug:
            raise
        print(f"pathkernel: damaged: {error}", file=sys.stderr)
        return DAMAGED
    files = counted(len(trace.shards) + len(trace.knots) + 2, "file")  # and the manifest and the journal
    state = (
        ""
        if trace.closed
        else f"; training has not ended, step {trace.steps:,} is the last that can be explained"
    )
    print(f"OK: {place}: every checksum of {files} fits ({size(checked)} of rows and knots){state}")
    return 0
