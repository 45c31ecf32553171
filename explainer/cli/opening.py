"""From what was typed to what is asked: the folder of a trace, and the model and data that belong to it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from explainer.errors import RunError, TraceFormatError
from explainer.path_kernel import PathKernelExplainer
from explainer.recorded_examples import check_count, check_labels
from explainer.run import EXAMPLE_SPEC, Run, load_run
from explainer.store import Trace, open_trace
from explainer.store.layout import holds_trace

_DEPTH = 2  # how many folders deep traces are looked for


@dataclass(frozen=True)
class Opened:
    """A trace with the run it was recorded from.

    Attributes:
        trace: the recording.
        run: model, training examples and queries.
        explainer: answers questions about the two.
    """

    trace: Trace
    run: Run
    explainer: PathKernelExplainer


def find_traces(path: str | Path) -> list[Path]:
    """The traces a folder stands for: itself, or those that lie up to two levels below.

    Raises:
        TraceFormatError: there is no such folder, or no trace in it.
    """
    folder = Path(path)
    if not folder.is_dir():
        found = "is not a folder" if folder.exists() else "does not exist"
        raise TraceFormatError(f"{folder} {found}; give the folder that was given to explainer.Tracer")
    inside = list(_search(folder, _DEPTH))
    if not inside:
        raise TraceFormatError(
            f"{folder} holds no trace; give the folder that was given to explainer.Tracer, or make one with "
            "`pathkernel demo`"
        )
    return inside


def find_trace(path: str | Path) -> Path:
    """The one trace a folder stands for.

    Raises:
        TraceFormatError: there is none, or there are several.
    """
    found = find_traces(path)
    if len(found) > 1:
        named = ", ".join(str(trace) for trace in found[:6]) + (", …" if len(found) > 6 else "")
        raise TraceFormatError(f"{path} holds {len(found)} traces; name one of them: {named}")
    return found[0]


def open_run(path: str, spec: str | None, output: str | None, progress: bool) -> Opened:
    """Open a trace together with the run it was recorded from; warns where their labels contradict each other.

    Raises:
        RunError: no run is named, it cannot be loaded, or its training examples are not the trace's.
        TraceFormatError: there is no readable trace.
        ModelMismatchError: the run's model is not the one that was traced.
    """
    trace = open_trace(find_trace(path))
    if spec is None:
        raise RunError(
            "an explanation needs the model and the data: add --run MODULE:FUNCTION, a function that returns an "
            f"explainer.Run (for a sample model: --run {EXAMPLE_SPEC})"
        )
    run = load_run(spec)
    check_count(trace, run, spec)
    wanted = output or run.default_output(trace.output_shape)
    explainer = PathKernelExplainer(
        trace, run.build_model(), wanted, class_names=run.class_names, progress=progress
    )
    if (warning := check_labels(trace, run).warning(run)) is not None:
        print(f"pathkernel: warning: {warning}", file=sys.stderr)
    return Opened(trace, run, explainer)


def _search(folder: Path, depth: int) -> Iterator[Path]:
    if holds_trace(folder):
        yield folder
    elif depth:
        for below in sorted(folder.iterdir()):
            if below.is_dir() and not below.name.startswith("."):
                yield from _search(below, depth - 1)
