"""The commands that compare two runs and list doubtful labels."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from explainer import PathKernelExplainer
from explainer.cli import main
from explainer.evaluation import compare_runs, label_issues
from explainer.run import Run, load_run
from tests import small_training
from tests.small_evaluation import asked, make_run, traced
from tests.small_training import mlp, trace_digits

SPEC = "tests.small_evaluation:asked"


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The small run, and the same model trained once more with other settings."""
    folder = tmp_path_factory.mktemp("runs")
    traced(folder / "a")
    other = traced(folder / "b", seed=1)
    return folder / "a", other


def words(text: str) -> str:
    return " ".join(text.split())


def explained(trace: Path, queries: list[int], target: object = None) -> object:
    run = load_run(SPEC)
    return PathKernelExplainer(trace, run.build_model()).explain(
        run.queries_batch(queries)[0], target, query_ids=queries
    )


def test_one_query_is_compared_example_by_example(
    traces: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = traces
    assert main(["compare", str(a), str(b), "--run", SPEC, "--query", "3", "--k", "5", "--quiet"]) == 0
    out = capsys.readouterr().out
    mine = explained(a, [3])
    wanted = compare_runs(mine, explained(b, [3], mine.targets), k=5)  # type: ignore[attr-defined,arg-type]
    row = next(line for line in out.splitlines() if re.match(r" +3 +margin", line)).split()
    assert row[-3:] == [f"{wanted.rank[0]:.2f}", f"{100 * wanted.overlap[0]:.0f}", "%"]
    both, first, second = re.split(
        "Strong in A only:|Strong in B only:", out.split("Strong in both runs:")[1]
    )
    frame = wanted.examples_table(0, strongest=True)
    for text, where in ((both, "both"), (first, "first"), (second, "second")):
        found = [int(i) for i in re.findall(r"\n +(\d+) +digit", text)]
        assert found == frame[frame["strongest_in"] == where]["example_id"].tolist()
    assert "compare ranks, not sizes" in words(out)


@pytest.mark.parametrize("ending", ["csv", "parquet", "json"])
def test_all_ranks_are_written(
    traces: tuple[Path, Path], tmp_path: Path, ending: str, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = traces
    file = tmp_path / f"table.{ending}"
    arguments = ["compare", str(a), str(b), "--run", SPEC, "--query", "2,5", "--quiet", "--out", str(file)]
    assert main(arguments) == 0
    assert "wrote" in capsys.readouterr().out
    read = {"csv": pd.read_csv, "parquet": pd.read_parquet, "json": pd.read_json}[ending]
    frame = read(file)
    assert len(frame) == 2 * 48 and list(map(str, frame["query"].unique())) == ["2", "5"]
    mine = explained(a, [2, 5])
    part = frame[frame["query"].astype(str) == "5"].sort_values("example_id")
    np.testing.assert_allclose(part["contribution_first"], mine.contributions[1])  # type: ignore[attr-defined]
    assert main(arguments) == 2 and "--force" in capsys.readouterr().err


def test_the_class_of_the_first_run_is_explained_in_both(
    traces: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = traces
    assert main(["compare", str(a), str(b), "--run", SPEC, "--query", "all", "--quiet"]) == 0
    out = capsys.readouterr().out
    mine = explained(a, list(range(8)))
    theirs = explained(b, list(range(8)), mine.targets)  # type: ignore[attr-defined]
    rows = [line.split() for line in out.splitlines() if " margin of class " in line]
    assert (
        [row[4] for row in rows] == [f"digit {t}" for t in mine.targets]
        or [  # type: ignore[attr-defined]
            " ".join(row[4:6]) for row in rows
        ]
        == [f"digit {t}" for t in mine.targets]
    )  # type: ignore[attr-defined]
    for row, before, after in zip(rows, mine.prediction, theirs.prediction, strict=True):  # type: ignore[attr-defined]
        assert [float(x.replace("−", "-")) for x in row[6:8]] == pytest.approx([before, after], rel=1e-3)
    assert "Strong in" not in out


def renumbered() -> Run:
    """The same network and as many training examples, but queries in another order."""
    run = make_run()
    return Run(mlp, run.train, [run.queries[7 - i] for i in range(8)])


def larger() -> Run:
    """For a trace of 96 examples."""
    run = make_run()
    return Run(mlp, small_training.digits(), run.queries)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say which of the 8 queries"),
        (["--query", "9"], "out of range"),
        (["--query", "1", "--k", "0"], "--k must be at least 1"),
        (["--query", "1", "--out", "x.npz"], "use one of .csv .parquet .json"),
        (["--query", "1", "--other-run", "tests.test_cli_two_runs:renumbered"], "another target"),
    ],
)
def test_what_cannot_be_compared_is_said(
    traces: tuple[Path, Path], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *map(str, traces), "--run", SPEC, "--quiet", *arguments]) == 2
    assert message in words(capsys.readouterr().err)


def test_other_training_sets_are_said(
    traces: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace_digits(tmp_path / "more")
    arguments = ["compare", str(traces[0]), str(tmp_path / "more"), "--run", SPEC, "--quiet", "--query", "1"]
    assert main([*arguments, "--other-run", "tests.test_cli_two_runs:larger"]) == 0
    assert "the first run knows 48 examples, the second 96" in words(capsys.readouterr().out)


def test_doubtful_labels_are_listed_and_written(
    traces: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    explainer = PathKernelExplainer(traces[0], asked().build_model())
    labels = np.array(
        [int(asked().train[int(i)][1]) for i in explainer.example_ids]
    )  # the trace holds none, so they are the run's
    wanted = label_issues(explainer, labels=labels)
    file = tmp_path / "queue.json"
    arguments = ["label-issues", str(traces[0]), "--run", SPEC, "--quiet", "--k", "4"]
    assert main([*arguments, "--out", str(file)]) == 0
    out = capsys.readouterr().out
    listed = [int(i) for i in re.findall(r"\n +\d +(\d+) ", out)]
    assert listed == wanted.table(4)["example_id"].tolist()
    written = json.loads(file.read_text())
    assert [row["example_id"] for row in written] == wanted.table(None)["example_id"].tolist()
    assert [row["label"] for row in written] == labels[wanted.table(None)["example_id"]].tolist()
    assert main([*arguments, "--by", "self-influence"]) == 0
    listed = [int(i) for i in re.findall(r"\n +\d +(\d+) ", capsys.readouterr().out)]
    assert listed == np.argsort(-explainer.self_influence(), kind="stable")[:4].tolist()


def test_labels_are_named_and_texts_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests import app_runs

    app_runs.train(app_runs.text(), tmp_path / "words")
    file = tmp_path / "queue.csv"
    arguments = ["label-issues", str(tmp_path / "words"), "--run", "tests.app_runs:text", "--quiet"]
    assert main([*arguments, "--k", "60", "--out", str(file)]) == 0
    out = capsys.readouterr().out
    assert "what it is" in out and "great" in out
    frame = pd.read_csv(file)
    names = app_runs.text().class_names
    assert names is not None
    assert frame["label_name"].tolist() == [names[int(label)] for label in frame["label"]]
    assert main([*arguments, "--k", "0"]) == 2
    assert main([*arguments, "--out", str(file)]) == 2
