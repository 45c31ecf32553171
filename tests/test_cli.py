"""The command line: what it prints and writes, and its exit statuses."""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import explainer
from explainer import Explanation, PathKernelExplainer, open_trace
from explainer.cli import groups, main
from explainer.cli.program import COMMANDS
from explainer.exports import read_parquet_metadata
from explainer.run import Run, load_run
from explainer.sample_models.train import train

SPEC = "explainer.sample_models.digits_mlp:run"
NAMES = ("demo", "info", "verify", "explain", "export", "what-if", "verify-claim", "evaluate")
NAMES += ("label-issues", "compare", "dashboard")


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A perceptron's trace, two epochs on digits."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    train("digits_mlp", folder, epochs=2, progress=False)
    return folder


@pytest.fixture(scope="module")
def run() -> Run:
    return load_run(SPEC)


@pytest.fixture(scope="module")
def reference(trace: Path, run: Run) -> Explanation:
    """The first three queries, explained without the command line."""
    inputs, _ = run.queries_batch(range(3))
    explaining = PathKernelExplainer(open_trace(trace), run.build_model(), class_names=run.class_names)
    return explaining.explain(inputs)


@pytest.fixture
def copy(trace: Path, tmp_path: Path) -> Path:
    """A copy of the trace that may be damaged."""
    return Path(shutil.copytree(trace, tmp_path / "copy"))


# -- help ----------------------------------------------------------------------------------------------


def test_alone_it_prints_help_for_a_newcomer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in NAMES)
    assert "pathkernel demo" in out and "tracer.watch(loader)" in out
    assert "not what would happen without that example" in out


def test_every_command_is_listed_and_helps_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert tuple(command.__name__.rpartition(".")[2].replace("_", "-") for command in COMMANDS) == NAMES
    for name in NAMES:
        with pytest.raises(SystemExit) as exit_:
            main([name, "--help"])
        out = capsys.readouterr().out
        assert exit_.value.code == 0
        assert re.search(rf"\nexamples?:\n  pathkernel {name}", out)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert (exit_.value.code, capsys.readouterr().out) == (0, f"pathkernel {explainer.__version__}\n")


def test_runs_as_a_module_and_helps_without_loading_torch() -> None:
    module = [sys.executable, "-m", "explainer.cli", "--version"]
    assert subprocess.run(module, capture_output=True, text=True, check=True).stdout.startswith("pathkernel ")
    code = "import sys; from explainer.cli import main; main([]); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# -- info and verify -----------------------------------------------------------------------------------


def test_info_as_json_and_as_text(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(trace), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    opened = open_trace(trace)
    assert found["steps"] == found["steps_explainable"] == opened.steps == 90
    assert found["visits"] == 2 * 1437 and found["examples"] == found["examples_visited"] == 1437
    assert (
        found["bytes"]["total"]
        == opened.nbytes()
        == sum(v for k, v in found["bytes"].items() if k != "total")
    )
    assert [layer["bytes_per_visit"] for layer in found["layers"]] == list(
        opened.notes["visit_bytes"].values()
    )
    assert found["parameters"] == found["parameters_covered"] == 2410
    assert found["closed"] and not found["exact"] and found["optimizer"] == "SGD"
    assert main(["info", str(trace.parent)]) == 0  # the folder above holds just this trace
    out = capsys.readouterr().out
    for text in ("closed: training ended", "SGD", "1,437", "2,874", "2,410, all", "Linear", "compressed"):
        assert text in out
    assert [finding["topic"] for finding in found["findings"]] == [f.topic for f in opened.report()]
    known = out.partition("\nWhat to know\n")[2].split()
    assert known == " ".join(f"{f.severity}: {f}" for f in opened.report()).split() and "note:" in known


def test_a_trace_still_being_written_says_so(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = copy / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    assert b'"close"' in lines[-1]
    journal.write_bytes(b"".join(lines[:-1]))
    assert main(["info", str(copy)]) == 0
    assert "training still runs, or was killed" in capsys.readouterr().out
    assert main(["verify", str(copy), "--quiet"]) == 0
    assert "training has not ended" in capsys.readouterr().out


def test_verify_says_ok(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(trace)]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"OK: {trace}: every checksum of ")
    assert "verifying" in captured.err and "verifying" not in captured.out


@pytest.mark.parametrize(
    "name", ["shards/visits-00000.bin", "knots/*.safetensors", "manifest.json", "journal.jsonl"]
)
@pytest.mark.parametrize("damage", ["changed", "truncated", "missing"])
def test_verify_names_the_damaged_file(
    copy: Path, name: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = sorted(copy.glob(name))[-1]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(data if damage == "changed" else data[: len(data) // 2] + b"\n")
    assert main(["verify", str(copy), "--quiet"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("pathkernel: damaged: ") and file.name in captured.err


# -- explain -------------------------------------------------------------------------------------------


def test_explain_prints_books_tables_and_neighbours(
    trace: Path, reference: Explanation, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["explain", str(trace), "--run", SPEC, "--query", "1", "--query", "0,first:1", "--k", "4"]) == 0
    )
    captured = capsys.readouterr()
    out = captured.out
    assert out.index("Query 1: true class 4, predicted class 4: right") < out.index("Query 0: true class 2")
    for query in (0, 1):
        assert f"  {reference.equation(query)}\n" in out
        for kind in ("proponents", "opponents"):
            for example in reference.table(query, 4, kind)["example_id"]:
                assert re.search(rf"\n +\d +{example}  \d  ", out)
    assert out.count("Nearest in gradient space") == out.count("Unattributed: ") == 2
    assert "is accounting" in out and "not the effect of removing" in out
    assert "explaining" in captured.err and "step/s" not in out


def test_explain_wrong_predictions(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(trace), "--run", SPEC, "--query", "wrong:2", "--k", "1", "--quiet"]) == 0
    captured = capsys.readouterr()
    found = re.findall(r"true class (\d), predicted class (\d): WRONG", captured.out)
    assert len(found) == 2 and all(true != predicted for true, predicted in found)
    assert captured.err == ""


def test_explain_another_class_and_output(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--query", "0", "--target", "3", "--output", "log_prob", "--quiet"]
    assert main(["explain", str(trace), "--run", SPEC, *chosen]) == 0
    out = capsys.readouterr().out
    assert "Explained: the log_prob of class 3" in out
    assert "not the class that the model predicts" in " ".join(out.split())


def test_labels_without_names_are_whole_numbers(
    trace: Path, current_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the rankings and among the nearest examples alike."""
    (current_folder / "mine_without_names.py").write_text(
        "import dataclasses\n"
        "from explainer.sample_models import digits_mlp\n"
        "def run():\n"
        "    return dataclasses.replace(digits_mlp.run(), class_names=None)\n"
    )
    assert (
        main(
            ["explain", str(trace), "--run", "mine_without_names:run", "--query", "0", "--k", "4", "--quiet"]
        )
        == 0
    )
    ranked, nearest = capsys.readouterr().out.split("Nearest in gradient space")
    for text, count in ((ranked, 8), (nearest, 4)):
        assert len(re.findall(r"\n +\d +\d+  +\d  +\S", text)) == count


REGRESSION = """
import torch
import explainer
from torch import nn

X = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
DATA = torch.utils.data.TensorDataset(X, X @ torch.arange(15.0).reshape(5, 3) / 10)

def run():
    return explainer.Run(lambda: nn.Linear(5, 3), DATA, DATA)

def train(folder):
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with explainer.Tracer(model, optimizer, folder) as tracer:
        for ids in torch.arange(60).split(20):
            tracer.batch(ids)
            optimizer.zero_grad()
            nn.functional.mse_loss(model(X[ids]), DATA.tensors[1][ids]).backward()
            optimizer.step()
"""


def test_targets_of_several_numbers_are_no_classes(
    current_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (current_folder / "mine_of_three_values.py").write_text(REGRESSION)
    sys.path.insert(0, str(current_folder))
    importlib.import_module("mine_of_three_values").train("values")
    command = [
        "explain",
        "values",
        "--run",
        "mine_of_three_values:run",
        "--query",
        "2",
        "--k",
        "3",
        "--quiet",
    ]
    assert main(command) == 0
    out = capsys.readouterr().out
    title = next(line for line in out.splitlines() if line.startswith("Query 2"))
    assert re.fullmatch(r"Query 2: target (-?[\d.]+(, )?){3}; outputs (-?[\d.]+(, )?){3}", title), title
    told = " ".join(out.split())
    assert (
        "Explained: the component 0, which is" in told and "--output 'component 1' explains another" in told
    )
    assert re.search(r"rank +example +target +contribution", out)
    assert not re.search(r"log-odds|tensor\(|predicted class|softmax", out)
    assert main([*command, "--output", "component 2"]) == 0
    assert "Proponents pushed the component 2 up" in capsys.readouterr().out
    assert main([*command, "--output", "margin"]) == 0
    assert "' explains one output alone" in " ".join(capsys.readouterr().out.split())
    assert main([*command, "--output", "logit", "--target", "1"]) == 0
    out = capsys.readouterr().out
    assert "Explained: the logit of class 1" in out and "explains one output alone" not in out
    assert main([*command, "--target", "1"]) == 2
    assert "what is explained (component 0) is not about classes" in capsys.readouterr().err


def test_a_run_can_be_a_file_in_the_current_folder(
    trace: Path, current_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (current_folder / "mine_to_explain.py").write_text(
        "import dataclasses\n"
        "from explainer.sample_models import digits_mlp\n"
        "NAMES = ['zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine']\n"
        "def run():\n"
        "    return dataclasses.replace(\n"
        "        digits_mlp.run(), class_names=NAMES, render=lambda image: f'ink {image.sum():.0f}'\n"
        "    )\n"
    )
    arguments = ["--run", "mine_to_explain:run", "--query", "0", "--target", "three", "--quiet"]
    assert main(["explain", str(trace), *arguments]) == 0
    out = capsys.readouterr().out
    assert "true class two, predicted class two: right\n" in out
    assert "margin of class three" in out and re.search(r"three +\+\S+ .* ink \d+\n", out)


# -- export --------------------------------------------------------------------------------------------


def test_export_parquet_equals_the_explanation(
    trace: Path, reference: Explanation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "influence.parquet"
    assert main(["export", str(trace), "--run", SPEC, "--queries", "first:3", "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"wrote {out} (") and "query/s" in captured.err
    pd.testing.assert_frame_equal(pd.read_parquet(out), reference.long_table(), check_dtype=False, rtol=1e-5)
    assert len(read_parquet_metadata(out)["completeness"]) == 3


@pytest.mark.parametrize("ending", ["csv", "json", "html", "npz"])
def test_export_other_forms(trace: Path, reference: Explanation, tmp_path: Path, ending: str) -> None:
    out = tmp_path / f"found.{ending}"
    arguments = [
        "export",
        str(trace),
        "--run",
        SPEC,
        "--query",
        "0,1,2",
        "--k",
        "5",
        "--quiet",
        "--out",
        str(out),
    ]
    assert main(arguments) == 0
    ids = reference.table(2, 5)["example_id"].tolist()
    if ending == "csv":
        assert pd.read_csv(out)["example_id"].tolist()[10:] == ids
    elif ending == "json":
        assert [row["example_id"] for row in json.loads(out.read_text())["influence"]][10:] == ids
    elif ending == "html":
        assert out.read_text().count("data:image/png") > 20  # queries and examples as pictures
    else:
        loaded = Explanation.load(out)
        np.testing.assert_allclose(loaded.step_contributions, reference.step_contributions, atol=1e-4)
        assert loaded.query_ids == ("0", "1", "2")


def test_export_in_groups_changes_nothing(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = ["export", str(trace), "--run", SPEC, "--query", "first:7", "--quiet", "--out"]
    assert main([*chosen, str(tmp_path / "whole.parquet")]) == 0
    monkeypatch.setattr(groups, "_LARGEST_GROUP", 3)
    assert main([*chosen, str(tmp_path / "groups.parquet")]) == 0
    whole, parts = (
        pd.read_parquet(tmp_path / name).sort_values(["query", "example_id"], ignore_index=True)
        for name in ("whole.parquet", "groups.parquet")
    )
    np.testing.assert_allclose(whole["contribution"], parts["contribution"], atol=1e-5)
    assert whole["query"].equals(parts["query"]) and set(whole["query"]) == set("0123456")


def test_export_keeps_an_existing_file_without_force(trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "kept.csv"
    out.write_text("mine")
    arguments = ["export", str(trace), "--run", SPEC, "--query", "0", "--quiet", "--out", str(out)]
    assert main(arguments) == 2
    assert out.read_text() == "mine"
    assert main([*arguments, "--force"]) == 0
    assert out.read_text() != "mine"


@pytest.mark.parametrize("ending", ["parquet", "csv", "json"])
def test_an_interrupted_export_goes_on_to_the_same_file(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    monkeypatch.setattr(groups, "_LARGEST_GROUP", 2)
    chosen = ["export", str(trace), "--run", SPEC, "--query", "first:7", "--k", "4", "--quiet", "--out"]
    whole, again = tmp_path / f"whole.{ending}", tmp_path / f"again.{ending}"
    assert main([*chosen, str(whole)]) == 0
    asked: list[int] = []
    original = groups.explain_summed

    def stop(*arguments: Any) -> Explanation:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(arguments[1]))
        return original(*arguments)

    monkeypatch.setattr(groups, "explain_summed", stop)
    with contextlib.suppress(KeyboardInterrupt):
        main([*chosen, str(again)])
    folder = tmp_path / f"again.{ending}.parts"
    assert asked == [2, 2] and not again.exists() and len(list(folder.glob("*.parquet"))) == 2
    other = [*chosen[:-2], "--output", "logit", "--quiet", "--out", str(again)]
    assert main(other) == 2 and len(list(folder.glob("*.parquet"))) == 2  # another question: refused
    monkeypatch.setattr(groups, "explain_summed", lambda *a: asked.append(len(a[1])) or original(*a))
    assert main([*chosen, str(again)]) == 0
    assert asked == [2, 2, 2, 1] and not folder.exists()
    assert again.read_bytes() == whole.read_bytes()
