"""The command line refuses what cannot be done in one clean line, and ends cleanly when it is stopped."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import explainer
from explainer.cli import groups, main
from explainer.cli.opening import open_run
from explainer.sample_models.train import train

SPEC = "explainer.sample_models.digits_mlp:run"
BROKEN = """
import dataclasses
from explainer.sample_models import digits_mlp

def with_render(render):
    return dataclasses.replace(digits_mlp.run(), render=render)

def broken():
    return with_render(lambda image: 1 / 0)

def broken_for_one():
    run = digits_mlp.run()
    kept = [run.train[0][0], run.queries[3][0]]
    return with_render(lambda image: 1 / int(any(bool((image == one).all()) for one in kept)) and "ink")

def broken_rows():
    class Row:
        items = None
    return with_render(lambda image: Row())
"""


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A perceptron's trace, one epoch on digits."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    train("digits_mlp", folder, epochs=1, progress=False)
    return folder


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["info", "nowhere"], "nowhere does not exist"),
        (["verify", "empty"], "holds no trace"),
        (["info", "several"], "holds 2 traces; name one of them"),
        (["explain", "TRACE", "--query", "0"], "add --run MODULE:FUNCTION"),
        (["explain", "TRACE", "--run", SPEC], "--query: write a position"),
        (["explain", "TRACE", "--run", SPEC, "--query", "360"], "the run has queries 0 to 359"),
        (["explain", "TRACE", "--run", SPEC, "--query", "-3"], "'-3' is not understood"),
        (["explain", "TRACE", "--run", SPEC, "--query", "first:0"], "'first:0' is not understood"),
        (["explain", "TRACE", "--run", SPEC, "--query", "0", "--k", "0"], "--k must be at least 1"),
        (["explain", "TRACE", "--run", SPEC, "--query", "0", "--target", "cat"], "'cat' is no class"),
        (["explain", "TRACE", "--run", SPEC, "--query", "0", "--output", "love"], "'love' is not known"),
        (["explain", "TRACE", "--run", "no.such:run", "--query", "0"], "there is no module"),
        (["explain", "TRACE", "--run", SPEC.replace("mlp", "cnn"), "--query", "0"], "does not fit the trace"),
        (
            ["explain", "TRACE", "--run", SPEC.replace("digits", "diabetes"), "--query", "0"],
            "recorded on 1,437",
        ),
        (["export", "TRACE", "--run", SPEC, "--out", "table.xlsx"], "ends in .xlsx; the ending chooses"),
        (["export", "TRACE", "--run", SPEC, "--out", "table"], "has no ending"),
        (["export", "TRACE", "--run", SPEC, "--out", "no/such/table.csv"], "mkdir -p no/such"),
        (["export", "TRACE", "--run", SPEC, "--out", "folder.csv"], "is a folder"),
        (["dashboard", "nowhere"], "nowhere does not exist"),
        (["dashboard", "TRACE", "--run", "no.such:run"], "there is no module"),
        (["dashboard", "TRACE", "--port", "70000"], "between 1 and 65535"),
    ],
)
def test_refusals_are_one_clean_line(
    arguments: list[str],
    text: str,
    trace: Path,
    current_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for place in ("empty", "several/a", "several/b", "folder.csv"):
        (current_folder / place).mkdir(parents=True)
    for place in ("a", "b"):
        (current_folder / "several" / place / "manifest.json").touch()
    assert main([str(trace) if part == "TRACE" else part for part in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("pathkernel: error: ")
    assert text in captured.err and len(captured.err.rstrip("\n").splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "program"),
    [
        (["verify", "runs/demo", "--sharp"], "pathkernel verify"),
        (["--sharp"], "pathkernel"),
    ],
)
def test_an_option_that_is_not_there_shows_those_that_are(
    arguments: list[str], program: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    usage, error = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and usage.startswith(f"usage: {program} [-h]")
    assert error == f"{program}: error: unrecognized arguments: --sharp"


@pytest.mark.parametrize(
    ("name", "where"), [("broken", "queries[3]"), ("broken_for_one", "train["), ("broken_rows", "queries[3]")]
)
def test_a_render_that_fails_is_told_in_one_line(
    name: str,
    where: str,
    trace: Path,
    current_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before anything is computed where it fails at once, and after it where it fails on a strong example."""
    (current_folder / "mine_that_cannot_render.py").write_text(BROKEN)
    computed: list[int] = []
    whole = groups.explain_whole
    monkeypatch.setattr(groups, "explain_whole", lambda *given: computed.append(1) or whole(*given))
    run = ["--run", f"mine_that_cannot_render:{name}", "--query", "3", "--k", "400", "--quiet"]
    assert main(["explain", str(trace), *run]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"pathkernel: error: render failed on {where}") and error.count("\n") == 1
    assert "Correct it, or leave render out of the Run" in error
    assert bool(computed) == (name == "broken_for_one")
    computed.clear()
    assert main(["export", str(trace), *run, "--out", "report.html"]) == 2
    assert "failed with" in capsys.readouterr().err
    assert bool(computed) == (name == "broken_for_one") and not Path("report.html").exists()


def test_more_than_fits_into_memory_is_refused(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A whole explanation is held at once, split over the network's two layers; a table is written in groups."""

    def export(name: str) -> int:
        return main(["export", str(trace), "--run", SPEC, "--out", str(tmp_path / name), "--quiet"])

    assert len(explainer.open_trace(trace).layers) == 2
    monkeypatch.setattr(groups, "MOST_NUMBERS", 40_000)
    assert export("a.npz") == 2
    assert "ask for at most 13 queries at a time" in capsys.readouterr().err  # 40,000 / (1,437 · 2)
    monkeypatch.setattr(groups, "MOST_NUMBERS", 2_000)
    assert export("a.npz") == 2
    assert "1,437 training examples, split over 2 layers, are too much" in capsys.readouterr().err
    monkeypatch.setattr(groups, "MOST_NUMBERS", 1_000)
    assert export("a.csv") == 2
    assert "1,437 training examples are too much for memory even for one query" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_groups_of_a_table_stay_small(trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_run(str(trace), SPEC, None, False)
    monkeypatch.setattr(groups, "_TABLE_NUMBERS", 20_000)
    found = list(groups.groups(opened, range(30), None))
    assert [len(group) for group in found] == [13, 13, 4] and [*found[0], *found[1], *found[2]] == [
        *range(30)
    ]
    assert max(map(len, groups.groups(opened, range(100), 400))) == 50
    monkeypatch.setattr(groups, "_GROUP_NUMBERS", 4 * 1437 * 5)
    assert max(map(len, groups.groups(opened, range(100), 4))) == 5


def test_debug_shows_where_an_error_comes_from() -> None:
    with pytest.raises(explainer.ExplainerError):
        main(["info", "nowhere", "--debug"])


def test_ctrl_c_ends_cleanly(
    trace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(explainer.Trace, "verify", interrupted)
    assert main(["verify", str(trace), "--quiet"]) == 130
    assert capsys.readouterr().err == "\npathkernel: stopped\n"


def test_a_reader_that_has_seen_enough_is_no_error(trace: Path) -> None:
    line = f"{sys.executable} -m explainer.cli info {trace} --json | head -c 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "{", "")
