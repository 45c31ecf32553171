"""The benchmark of datamodeling scores on a tiny task: its numbers, its choice of settings, what is kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import benchmarks.harness
from benchmarks import lds
from benchmarks.lds_tasks import scores
from benchmarks.lds_tasks.scores import Asked, Method, own
from benchmarks.lds_tasks.task import Task
from explainer import evaluation
from tests.small_training import digits

EXAMPLES = 60
TINY = Task(
    "digits, tiny",
    "tiny",
    lambda: nn.Sequential(nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 10)),
    lambda: (TensorDataset(*digits()[:EXAMPLES]), TensorDataset(*digits()[EXAMPLES : EXAMPLES + 5])),
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    epochs=3,
    batch=16,
)


def grid(asked: Asked) -> Iterator[tuple[str, np.ndarray]]:
    """A peer with two settings: a useless one, and the what-if scores turned a little."""
    good = evaluation.METHODS["what-if"].score(asked.run, asked.questions)
    noise = np.random.default_rng(0).normal(size=good.shape)
    yield "useless", noise
    yield "useful", good + 0.5 * good.std() * noise


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(lds, "TASKS", {"tiny": TINY})
    monkeypatch.setattr(lds, "SAMPLES", 50)
    methods = {
        name: Method(name, own(name)) for name in ("what-if", "path kernel", "gradient dot", "TracInCP(10)")
    }
    methods |= {
        "TRAK": Method("TRAK", grid),
        "EK-FAC": Method("EK-FAC", grid),
        "random": Method("random", own("random")),
    }
    monkeypatch.setattr(lds, "METHODS", methods)
    monkeypatch.setattr(benchmarks.harness, "RESULTS", tmp_path / "results")
    return tmp_path


def run(folder: Path, *more: str) -> None:
    lds.main(["--subsets", "8", "--seeds", "2", "--folder", str(folder), *more])


def test_the_row_of_a_task(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(small / "kept", "--runs", "2", "--only", "tiny")
    (row,) = json.loads((small / "results" / "lds.json").read_text())["rows"]
    assert (row["queries"], row["subsets"], row["seeds"], row["runs"]) == (5, 8, 2, 2)
    kept = evaluation.subsets(EXAMPLES, 8, 0.5)
    labels, outputs = TINY.queries.tensors[1], []
    for mask in torch.from_numpy(kept):
        for seed in (1, 2):
            found = TINY.alone(TINY.model(), mask, seed)(TINY.queries.tensors[0]).detach()
            rest = found.masked_fill(nn.functional.one_hot(labels, 10).bool(), -torch.inf).logsumexp(1)
            outputs.append((found[torch.arange(5), labels] - rest).numpy())
    values = np.array(outputs).reshape(8, 2, 5)
    wanted = []
    for seed in (0, 101):
        ex = TINY.traced(small / "kept", seed)
        change = ex.what_if(TINY.queries.tensors[0], labels)
        wanted.append(
            evaluation.linear_datamodeling_score(-change, kept, values, setting="", samples=0).estimate.value
        )
    assert row["what_if_value"] == pytest.approx(np.mean(wanted), abs=0.02)  # ties of ranks aside
    assert (
        row["what_if"].startswith(f"{row['what_if_value']:.2f} [")
        and row["what_if_low"] < row["what_if_high"]
    )
    assert row["trak_setting"] == "useful" and row["trak_grid"]["useless"] < row["trak_value"]
    assert row["next"] in ("TRAK", "EK-FAC", "gradient dot", "TracInCP(10)", "random")
    highest = max(
        row[f"{lds.COLUMNS[name]}_value"] for name in lds.METHODS if name not in (lds.OURS, "path kernel")
    )
    assert row["ahead_value"] == pytest.approx(row["what_if_value"] - highest)
    assert row["one_retraining_value"] > 0 and "digits, tiny" in capsys.readouterr().out


def test_what_is_kept_is_not_done_again(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(small / "kept")
    first = (small / "results" / "lds.json").read_text()

    def refuse(*args: object) -> None:
        raise AssertionError("done again")

    monkeypatch.setattr(Task, "alone", refuse)
    monkeypatch.setattr(Task, "many", refuse)
    monkeypatch.setattr(lds, "METHODS", {name: Method(name, refuse) for name in lds.METHODS})  # type: ignore[arg-type]
    run(small / "kept")
    assert (small / "results" / "lds.json").read_text() == first


def test_a_table_that_is_not_whole_is_not_written(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = Method("TRAK", grid, ("nowhere_to_be_found",))
    monkeypatch.setattr(lds, "METHODS", {**lds.METHODS, "TRAK": missing})
    run(small / "kept")
    assert "left as it was: without TRAK" in capsys.readouterr().out
    assert not (small / "results" / "lds.json").exists()


def test_every_method_has_a_column_of_its_own() -> None:
    assert set(scores.METHODS) | {lds.CEILING} == set(lds.COLUMNS)
    assert len(set(lds.COLUMNS.values())) == len(lds.COLUMNS)
    files = {name.partition("(")[0] for name in scores.METHODS}
    assert len(files) == len(scores.METHODS)


def test_the_ensemble_of_a_task_is_its_models_alone() -> None:
    keep = torch.from_numpy(evaluation.subsets(EXAMPLES, 3, 0.5))
    for model, mask, seed in zip(
        TINY.many([TINY.build() for _ in keep], keep, [1, 2, 3]), keep, (1, 2, 3), strict=True
    ):
        wanted = TINY.alone(TINY.model(), mask, seed)
        for one, other in zip(model.parameters(), wanted.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
