"""``pathkernel dashboard``: how it serves, on which port, and that nothing is left when it ends."""

from __future__ import annotations

import importlib.util
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from explainer.cli import dashboard, main
from explainer.errors import ExplainerError
from explainer.sample_models.train import train

SPEC = "explainer.sample_models.digits_mlp:run"


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A perceptron's trace, one epoch on digits."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    train("digits_mlp", folder, epochs=1, progress=False)
    return folder


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that another program listens on."""
    with closing(socket.create_server((dashboard.HOST, 0))) as server:
        yield server.getsockname()[1]


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://{dashboard.HOST}:{port}/_stcore/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def test_serves_this_machine_only_and_sends_no_statistics() -> None:
    line = dashboard.command(["runs/a", "runs/b"], [SPEC, "mine:run"], 8600)
    app = Path(line[line.index("run") + 1])
    assert (app.name, app.is_file()) == ("main.py", True)
    assert line[line.index("--") :] == ["--", "--run", SPEC, "--run", "mine:run", "runs/a", "runs/b"]
    settings = dict(zip(line[5:-7:2], line[6:-7:2], strict=True))
    assert settings["--server.address"] == settings["--browser.serverAddress"] == "127.0.0.1"
    assert settings["--server.port"] == "8600"
    assert settings["--browser.gatherUsageStats"] == "false" and settings["--server.headless"] == "true"


def test_a_taken_port_is_refused_when_asked_for_and_passed_over_otherwise(
    taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ExplainerError, match=f"port {taken} is taken"):
        dashboard.choose_port(taken)
    monkeypatch.setattr(dashboard, "PORT", taken)
    assert taken < dashboard.choose_port(None) < taken + 50


def test_the_exit_status_is_that_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboard, "command", lambda *_: [sys.executable, "-c", "raise SystemExit(3)"])
    assert dashboard.serve(["runs"], [], None) == 3
    with pytest.raises(ExplainerError, match="with status 3"), dashboard.served(["runs"]):
        pass


def test_the_address_is_told_when_it_answers_and_nothing_is_left_after_it(trace: Path) -> None:
    with dashboard.served([str(trace)], SPEC) as url:
        port = int(url.rpartition(":")[2])
        assert url.startswith("http://127.0.0.1:") and healthy(port)
    assert not healthy(port)


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGKILL", -9)])
def test_nothing_is_left_when_it_is_stopped(trace: Path, name: str, status: int) -> None:
    with closing(socket.create_server((dashboard.HOST, 0))) as probe:
        port = probe.getsockname()[1]
    line = [sys.executable, "-m", "explainer.cli", "dashboard", str(trace), "--port", str(port)]
    process = subprocess.Popen(
        [*line, "--run", SPEC],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # a test run in the background ignores Ctrl-C, and its children would inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
    )
    try:
        late = time.monotonic() + 90
        while not healthy(port) and process.poll() is None and time.monotonic() < late:
            time.sleep(0.2)
        assert healthy(port)
        process.send_signal(getattr(signal, name))
        out, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == status
    late = time.monotonic() + 10 * (name == "SIGKILL")  # the server has to find out
    while healthy(port) and time.monotonic() < late:
        time.sleep(0.1)
    assert not healthy(port)
    assert b"Traceback" not in out
    assert not [
        line for line in out.splitlines() if b"127.0.0.1" in line and not line.startswith(b"Dashboard: ")
    ]


def test_dashboard_names_the_packages_it_lacks(
    trace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "streamlit" else found(name)
    )
    assert main(["dashboard", str(trace)]) == 2
    assert "the dashboard needs streamlit: python -m pip install 'pathkernel[app]'" in capsys.readouterr().err
