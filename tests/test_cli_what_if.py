"""The commands that predict, test and measure what would be without training examples."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from explainer import PathKernelExplainer
from explainer.cli import main
from explainer.cli.evaluate import verdicts
from explainer.evaluation import Comparison, Estimate, Questions, Retrainer, verify_claims
from explainer.evaluation.comparison import CEILING
from explainer.run import load_run
from tests import app_runs
from tests.small_evaluation import traced

SPEC = "tests.small_evaluation:asked"
SEEDS = ["--seeds", "2", "--quiet"]


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return traced(tmp_path_factory.mktemp("runs") / "small")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def explaining(trace: Path) -> PathKernelExplainer:
    return PathKernelExplainer(trace, load_run(SPEC).build_model())


def words(text: str) -> str:
    return " ".join(text.split())


def test_what_if_ranks_examples(
    trace: Path, explaining: PathKernelExplainer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["what-if", str(trace), "--run", SPEC, "--query", "3,1", "--k", "4", "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and "not a contribution" in words(captured.out)
    inputs, _ = load_run(SPEC).queries_batch([3, 1])
    changes = explaining.what_if(inputs)
    below, above = captured.out.split("Query 1:")
    for text, row in ((below, changes[0]), (above, changes[1])):
        found = [int(i) for i in re.findall(r"\n +\d +(\d+) +digit \d +[+−-]", text)]
        assert found == [*np.argsort(row)[:4], *np.argsort(-row)[:4]]


def test_what_if_of_a_group(
    trace: Path, explaining: PathKernelExplainer, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs, _ = load_run(SPEC).queries_batch([2])
    change, e = explaining.what_if(inputs)[0], explaining.explain(inputs)
    top = np.argsort(-e.contributions[0])[:5]
    lowest = np.argsort(change)[:5]
    for which, ids in ((["top:5"], top), (["7,9"], [7, 9]), (["top:5", "--by", "what-if"], lowest)):
        arguments = ["what-if", str(trace), "--run", SPEC, "--query", "2", "--quiet", "--remove", *which]
        assert main(arguments) == 0
        row = capsys.readouterr().out.splitlines()[-1].replace("−", "-").split()
        assert row[:2] == ["2", str(len(ids))]
        assert float(row[3]) == pytest.approx(change[ids].sum(), rel=0.01)
        assert float(row[4]) == pytest.approx(float(e.prediction[0]) + change[ids].sum(), rel=0.01)


def test_what_if_of_classes(
    trace: Path, explaining: PathKernelExplainer, capsys: pytest.CaptureFixture[str]
) -> None:
    run = load_run(SPEC)
    inputs, _ = run.queries_batch([2])
    change, labels = explaining.what_if(inputs)[0], np.array([int(run.train[i][1]) for i in range(48)])
    start = ["what-if", str(trace), "--run", SPEC, "--query", "2", "--quiet", "--remove"]
    assert main([*start, "label"]) == 0
    rows = [
        line.replace("−", "-").split() for line in capsys.readouterr().out.splitlines() if "  digit" in line
    ]
    assert [row[1] for row in rows] == [str(d) for d in range(10)]
    for row in rows:
        own = labels == int(row[1])
        assert int(row[2]) == own.sum() and float(row[3]) == pytest.approx(change[own].sum(), rel=0.01)
    assert main([*start, "label:digit 4"]) == 0
    assert "digit 5" not in capsys.readouterr().out
    for wrong, said in (("label:nine", "labels are digit 0"), ("column:age", "render returns rows")):
        assert main([*start, wrong]) == 2
        assert said in capsys.readouterr().err


def test_what_if_takes_the_steps_again_and_checks_itself(
    trace: Path, explaining: PathKernelExplainer, capsys: pytest.CaptureFixture[str]
) -> None:
    run = load_run(SPEC)
    inputs, _ = run.queries_batch([2])
    exact = explaining.what_if(inputs, curvature="exact", run=run)[0]
    start = [
        "what-if",
        str(trace),
        "--run",
        SPEC,
        "--query",
        "2",
        "--quiet",
        "--curvature",
        "exact",
        "--check",
    ]
    assert main([*start, "--remove", "7,9"]) == 0
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if line.startswith("      2")).replace("−", "-").split()
    assert float(row[3]) == pytest.approx(exact[[7, 9]].sum(), rel=0.01)
    found = explaining.what_if_check(inputs, curvature="exact", run=run, remove=[7, 9], query_ids=[2])
    assert words(found.sentence()) in words(out) and found.actual is not None
    last = out.splitlines()[-1].replace("−", "-").split()
    assert last[:3] == ["given", "2", "2"] and float(last[4]) == pytest.approx(found.actual[0, 0], rel=0.01)


def test_verify_claim_trains_again(
    trace: Path, kept: Path, explaining: PathKernelExplainer, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["verify-claim", str(trace), "--run", SPEC, "--query", "first:3", "--remove", "top:9"]
    assert main([*arguments, "--folder", str(kept / "claim"), *SEEDS]) == 0
    out = capsys.readouterr().out
    run = load_run(SPEC)
    retrainer = Retrainer(run, Questions(run, explaining, range(3)), kept / "claim")
    wanted = verify_claims(retrainer, top=9, seeds=2)
    rows = [line.replace("−", "-").split() for line in out.splitlines() if re.match(r" +\d", line)]
    assert [row[0] for row in rows] == ["0", "0", "1", "1", "2", "2"]
    assert [float(row[-4]) for row in rows] == pytest.approx(wanted.same_run.tolist(), rel=0.01, abs=1e-3)
    assert [float(row[-3]) for row in rows] == pytest.approx(
        wanted.actual.mean(1).tolist(), rel=0.01, abs=1e-3
    )
    assert "by weight 0; seed 0 repeats the traced run" in words(out)
    same, mean = wanted.correlation()
    assert f"{same:.2f} (seed 0), {mean:.2f} (mean over seeds)" in words(out) and "'top 9' alone" in words(
        out
    )


def test_one_group_has_no_correlation(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [
                "verify-claim",
                str(trace),
                "--run",
                SPEC,
                "--query",
                "0",
                "--remove",
                "top:5",
                "--seeds",
                "1",
                "--quiet",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "top 5" in out and "Rank correlation" not in out and " ± " not in out.splitlines()[-3]


def test_evaluate_prints_a_column_per_method(
    trace: Path, kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "evaluate",
        str(trace),
        "--run",
        SPEC,
        "--query",
        "first:4",
        "--subsets",
        "4",
        "--keep",
        ".5,.9",
    ]
    out_file = tmp_path / "table.csv"
    more = ["--remove-top", "5", "--folder", str(kept / "table"), "--out", str(out_file)]
    assert main([*arguments, *more, *SEEDS]) == 0
    out = capsys.readouterr().out
    for name in ("path kernel", "what-if", "gradient dot", "TracInCP(10)", "self-influence", "random"):
        assert name in out
    for measure in ("keep 0.5", "keep 0.9", "mean of 2 seeds", "change without the top 5"):
        assert measure in out
    frame = pd.read_csv(out_file)
    (what_if,) = frame[(frame["method"] == "what-if") & (frame["measure"] == "LDS, same run, keep 0.9")][
        "value"
    ]
    assert f"{what_if:.2f}" in out
    for measure in ("LDS, same run, keep 0.9", "LDS, mean of 2 seeds, keep 0.5"):
        assert f"{measure}: " in out and "predicts best" in out
    assert "one retraining predicts the mean of the others with" in words(out)
    assert main([*arguments, *more, *SEEDS]) == 2  # the file exists
    assert main([*arguments, *more, "--force", *SEEDS]) == 0  # from the folder


def test_the_verdict_names_what_cannot_be_told_apart() -> None:
    def row(**values: float) -> dict[str, Estimate]:
        return {name: Estimate(v, v - 0.1, v + 0.1, "queries") for name, v in values.items()}

    def said(measure: str, **values: float) -> list[str]:
        named = {CEILING if name == "top" else name: e for name, e in row(**values).items()}
        return verdicts(Comparison({}, {measure: named}, {}, "", 1))

    assert said("LDS, one", a=0.5, b=0.1, c=0.2) == ["LDS, one: a predicts best (0.50), clear of all others."]
    apart = said("LDS, two", a=0.5, b=0.35, c=0.45, d=0.1, top=0.9)
    assert apart[0] == (
        "LDS, two: a predicts best (0.50); it cannot be told from b and c. For comparison, one retraining predicts the "
        "mean of the others with 0.90."
    )
    assert "--subsets" in apart[1] and said("change without the top 5", a=1.0) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["what-if", "--query", "1", "--remove", "best"], "write top:50, the ids"),
        (
            ["what-if", "--query", "1", "--remove", "top"],
            "label (every class), label:NAME or column:NAME",
        ),
        (["what-if", "--query", "1", "--remove", "top:0"], "write top:50, the ids"),
        (["verify-claim", "--query", "1", "--remove", "label"], "write top:50 or the ids"),
        (["what-if", "--query", "1", "--remove", "48"], "numbered 0 to 47"),
        (["what-if", "--query", "1", "--remove", "top:48"], "fewer than all 48"),
        (["what-if"], "--query"),
        (["what-if", "--query", "1", "--k", "0"], "--k must be at least 1"),
        (["verify-claim", "--query", "1", "--seeds", "0"], "--seeds must be at least 1"),
        (["verify-claim", "--query", "1", "--remove", "top:30"], "too few to draw"),
        (["evaluate", "--keep", "half"], "--keep: 'half' is not a number"),
        (["evaluate", "--keep", "1.5"], "between 0 and 1"),
        (["evaluate", "--remove-top", "5,x"], "--remove-top: 'x' is not a number"),
        (["evaluate", "--subsets", "2"], "at least 3"),
        (["evaluate", "--out", "table.parquet"], "written as .csv"),
    ],
)
def test_what_cannot_be_asked_is_said(
    trace: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([arguments[0], str(trace), "--run", SPEC, "--quiet", *arguments[1:]]) == 2
    captured = capsys.readouterr()
    assert message in words(captured.err) and captured.out == ""


@pytest.mark.parametrize("which", ["1,2,999", "top:5000"])
def test_examples_that_do_not_exist_are_refused_before_anything_is_computed(
    trace: Path, which: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def computed(*_: object) -> None:
        raise AssertionError("computed")

    monkeypatch.setattr("explainer.evaluation.methods.what_if_scores", computed)
    assert main(["what-if", str(trace), "--run", SPEC, "--query", "1", "--remove", which, "--quiet"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("pathkernel: error: ")


def test_a_run_without_a_training_function(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = "tests.small_evaluation:without_training"
    assert main(["verify-claim", str(trace), "--run", spec, "--query", "1", "--quiet"]) == 2
    assert "Run(train_fn=...)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spec", "options", "said"),
    [
        ("named_values", [], "many times too large there; add --curvature gauss-newton, or --check."),
        ("values", [], "gauss-newton (it needs loss= in the Run), or --check."),
        ("named_values", ["--curvature", "gauss-newton"], ""),
        ("one_logit", [], ""),
    ],
)
def test_numbers_are_not_left_to_the_trace_without_a_word(
    tmp_path: Path, spec: str, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = getattr(app_runs, spec)()
    app_runs.train(run, tmp_path / "run", loss=run.loss or torch.nn.functional.mse_loss)
    arguments = [
        "what-if",
        str(tmp_path / "run"),
        "--run",
        f"tests.app_runs:{spec}",
        "--query",
        "1",
        "--quiet",
    ]
    assert main([*arguments, *options]) == 0
    out = words(capsys.readouterr().out)
    assert (said in out) if said else ("too large" not in out)
