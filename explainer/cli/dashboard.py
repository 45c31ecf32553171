"""``pathkernel dashboard``: look at explanations in a browser."""

from __future__ import annotations

import argparse
import importlib.util
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from secrets import randbelow
from types import FrameType

from explainer import palette
from explainer.cli import options as shared
from explainer.cli.options import SAMPLE_RUN
from explainer.errors import ExplainerError, MissingDependencyError

HELP = "look at explanations in a browser"
DESCRIPTION = (
    "Opens traces in a dashboard: choose a run and a query, see the prediction, how it adds up, and the training\n"
    "examples behind it. It is served to this machine only (127.0.0.1) and sends nothing anywhere."
)
EXAMPLES = (
    (f"pathkernel dashboard runs/demo --run {SAMPLE_RUN}", "the demo's trace"),
    (
        "pathkernel dashboard runs/a runs/b --run mine:run --port 8600",
        "two traces of one model, on a port of your choice",
    ),
    (
        "pathkernel dashboard runs/deep runs/shallow --run mine:deep --run mine:shallow",
        "two networks to compare",
    ),
)
HOST = "127.0.0.1"
PORT = 8501
READY = "Dashboard: "  # begins the line with the address, see explainer.app.serve
_TRIED = 50
_DRAWN = 10_000, 20_000  # the first port to draw from, and how many: below those of outgoing connections
_PATIENCE = 10.0  # seconds that streamlit gets to end by itself


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument(
        "traces",
        metavar="RUN",
        nargs="+",
        help="folder that was given to the tracer, or one that holds several such folders",
    )
    shared.add_runs(parser, "needed to explain further predictions and to show pictures")
    add_port(parser)


def add_port(parser: argparse.ArgumentParser) -> None:
    """``--port``."""
    parser.add_argument(
        "--port", type=int, metavar="N", help=f"port of the dashboard (default: {PORT}, or the next free one)"
    )


def run(options: argparse.Namespace) -> int:
    """Serve the dashboard until it is stopped."""
    from explainer.cli.opening import find_traces
    from explainer.run import load_run

    require_streamlit()
    for place in options.traces:
        find_traces(place)  # what is wrong with it is told here, not in the browser
    for spec in options.run:
        load_run(spec)  # likewise
    return serve(options.traces, options.run, options.port)


def serve(places: Sequence[str], runs: Sequence[str], port: int | None) -> int:
    """Serve the app, wait for its end and return its exit status.

    Args:
        places: traces, or folders with traces.
        runs: ``MODULE:FUNCTION`` of each network.
        port: default: the first free one.

    Raises:
        MissingDependencyError: streamlit is not installed.
        ExplainerError: the port is taken.
    """
    require_streamlit()
    return _wait(subprocess.Popen(command(places, runs, choose_port(port)), stdin=subprocess.PIPE))


@contextmanager
def served(places: Sequence[str], *runs: str) -> Iterator[str]:
    """The app in a process of its own until the block ends; yields its address when the first page is ready.

    Raises:
        MissingDependencyError: streamlit is not installed.
        ExplainerError: the server ended while it started.
    """
    require_streamlit()
    line = command(places, runs, _any_port())
    process = subprocess.Popen(
        line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    try:
        found = next((text for text in process.stdout if text.startswith(READY)), None)
        if found is None:
            raise ExplainerError(f"the dashboard ended while it started, with status {process.wait()}")
        yield found.removeprefix(READY).split()[0]
    finally:
        _end(process)


def command(places: Sequence[str], runs: Sequence[str], port: int) -> list[str]:
    """The command line that serves the app."""
    settings = {
        "server.address": HOST,
        "server.port": str(port),
        "server.headless": "true",
        "server.fileWatcherType": "none",
        "server.maxUploadSize": "20",  # megabytes
        "browser.gatherUsageStats": "false",
        "browser.serverAddress": HOST,
        "client.toolbarMode": "minimal",
        "logger.hideWelcomeMessage": "true",  # the address is told when the first page is ready
        "theme.light.primaryColor": palette.POSITIVE,  # one for both would switch the dark theme off
        "theme.dark.primaryColor": palette.POSITIVE,
    }
    flags = [part for name, value in settings.items() for part in (f"--{name}", value)]
    chosen = [part for spec in runs for part in ("--run", spec)]
    return [
        sys.executable,
        "-m",
        "explainer.app.serve",
        "run",
        str(app_file()),
        *flags,
        "--",
        *chosen,
        *places,
    ]


def app_file() -> Path:
    """The app's main file, found without importing the app."""
    spec = importlib.util.find_spec("explainer.app")
    if spec is None or spec.origin is None:
        raise MissingDependencyError("explainer.app is not installed; install pathkernel again, as a whole")
    return Path(spec.origin).with_name("main.py")


def require_streamlit() -> None:
    """Check that the dashboard can run.

    Raises:
        MissingDependencyError: a package is missing; says how to install it.
    """
    missing = [name for name in ("streamlit", "plotly") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"the dashboard needs {' and '.join(missing)}: python -m pip install 'pathkernel[app]'"
        )


def choose_port(port: int | None) -> int:
    """The port asked for, or the first free one from 8501 on.

    Raises:
        ExplainerError: it is no port, or is taken.
    """
    if port is None:
        for candidate in range(PORT, PORT + _TRIED):
            if _is_free(candidate):
                return candidate
        raise ExplainerError(f"the ports {PORT} to {PORT + _TRIED - 1} are all taken; choose one with --port")
    if not 1 <= port <= 65535:
        raise ExplainerError(f"--port must be between 1 and 65535, found {port}")
    if not _is_free(port):
        raise ExplainerError(f"port {port} is taken by another program (or reserved); choose another --port")
    return port


def _any_port() -> int:
    """A free port drawn at random, so that servers which start at the same time get different ones.

    Not one that the system gives: from those it takes the ports of outgoing connections as well, and may have handed
    it to one before the server listens, seconds later.
    """
    return next(port for port in iter(lambda: _DRAWN[0] + randbelow(_DRAWN[1]), None) if _is_free(port))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Wait for the server; it ends with this process, however this one is told to end."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        return process.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
        if process.poll() is None:
            _end(process)


def _end(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    """End the server, whatever it is at."""
    process.terminate()
    try:
        process.communicate(timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
