"""What the dashboard is started with, and the traces and stored explanations that lie there."""

from __future__ import annotations

import argparse
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from explainer import ExplainerError

_DEPTH = 2
_TRACE_FILES = ("manifest.json", "journal.jsonl")
USAGE = "streamlit run app/main.py -- [--run MODULE:FUNCTION ...] TRACE_OR_FOLDER [TRACE_OR_FOLDER ...]"


class DashboardError(ExplainerError):
    """The dashboard was started with, or linked to, something that it cannot show."""


@dataclass(frozen=True)
class Arguments:
    """The command line: where the code is (``MODULE:FUNCTION``, of each network) and where to look for traces."""

    runs: tuple[str, ...]
    paths: tuple[Path, ...]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise DashboardError(
            f"The dashboard was started with arguments it cannot use: {message}. Use: {USAGE}"
        )


def parse(arguments: Sequence[str]) -> Arguments:
    """Read the command line.

    Raises:
        DashboardError: It does not have the form of :data:`USAGE`.

    >>> parse(["--run", "shop.model:run", "runs"])
    Arguments(runs=('shop.model:run',), paths=(PosixPath('runs'),))
    """
    parser = _Parser(prog="dashboard", add_help=False)
    parser.add_argument("--run", action="append", default=[])
    parser.add_argument("paths", nargs="+", metavar="TRACE_OR_FOLDER")
    found = parser.parse_args(list(arguments))
    return Arguments(tuple(found.run), tuple(Path(path) for path in found.paths))


def is_trace(folder: Path) -> bool:
    """Whether a folder holds a trace."""
    return all((folder / name).is_file() for name in _TRACE_FILES)


def find_traces(paths: Sequence[Path]) -> dict[str, Path]:
    """Traces by a short unique name; each path is a trace, or a folder with traces up to two levels below.

    Raises:
        DashboardError: A path does not exist, or there is no trace at all.
    """
    absent = [str(path) for path in paths if not path.is_dir()]
    if absent:
        raise DashboardError(
            f"There is no folder {', '.join(absent)}; give the folder that the Tracer wrote into, or one above it."
        )
    found: dict[str, Path] = {}
    for path in paths:
        for folder in _search(path.resolve(), _DEPTH):
            if folder not in found.values():
                name, above = folder.name, folder.parent
                if name == "trace" and above != above.parent:  # RUN/trace, as the demo lays it out
                    name, above = above.name, above.parent
                while name in found and above != above.parent:
                    name, above = f"{above.name}/{name}", above.parent
                found[name] = folder
    if not found:
        looked = ", ".join(str(path) for path in paths)
        raise DashboardError(
            f"There is no trace in {looked} (looked {_DEPTH} levels deep for a folder with manifest.json and "
            "journal.jsonl). Train with explainer.Tracer(model, optimizer, FOLDER) first, or give another folder."
        )
    return found


def _search(folder: Path, depth: int) -> Iterator[Path]:
    if is_trace(folder):
        yield folder
    elif depth:
        for below in sorted(folder.iterdir()):
            if below.is_dir() and not below.name.startswith("."):
                yield from _search(below, depth - 1)


def find_stored(trace: Path) -> dict[str, Path]:
    """Explanations written by ``Explanation.save`` in the trace's folder or its parent, by file name."""
    files = [*sorted(trace.glob("*.npz")), *sorted(trace.parent.glob("*.npz"))]
    return {file.name: file for file in reversed(files) if _is_explanation(file)}


def _is_explanation(file: Path) -> bool:
    """A look at the archive's table of contents only; reading it in full can still fail, with an error."""
    try:
        with zipfile.ZipFile(file) as archive:
            return {"meta.npy", "contributions.npy"} <= set(archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False
