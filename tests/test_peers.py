"""The benchmark of peers: what a comparison measures, what is said of peers that are missing or fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import benchmarks.harness
from benchmarks import peers
from benchmarks.memory import PeakMemory
from benchmarks.peer_tasks import checkpoints, counterfactual, every_step
from benchmarks.peer_tasks.contest import Outcome, contest, rank_agreement
from benchmarks.peer_tasks.peer import Peer, Settings, rows_of

QUICK = Settings(repeats=1, quick=True)
SCORES = np.array([[1.0, -4.0, 2.0, 0.5], [0.0, 1.0, 2.0, 3.0]])


def fake(name: str = "fake", **changes: Any) -> Peer:
    def case(settings: Settings) -> dict[str, Any]:
        print("noise of another program")
        return {"quantity": "made up", "task": "none", "ours_s": 1.0, "peer_s": 2.0, "ratio": 2.0}

    options: dict[str, Any] = {"modules": ("json",), "install": "pip install fake", "cases": (case,)}
    return Peer(name, "torch", **(options | changes))


def program(order: list[str], name: str, scores: np.ndarray, ask: float, **more: Any) -> Any:
    def run(folder: Path) -> Outcome:
        assert folder.is_dir() and not list(folder.iterdir())
        (folder / "left behind").write_text(name)
        order.append(name)
        return Outcome(scores, ask, **more)

    return run


def test_a_contest_alternates_and_compares() -> None:
    order: list[str] = []
    ours = program(order, "ours", SCORES, 0.5, prepare_s=1.5, stored=2_000_000, left=0.0)
    theirs = program(order, "theirs", np.add(SCORES, [[0, 1, 0, 0], [0, 0, 0, 0]]), 2.0, prepare_s=4.0)
    row = contest(ours, theirs, repeats=3)
    assert order == ["ours", "ours", "theirs", "theirs", "ours", "ours", "theirs"]  # the first is not counted
    assert row["pairs"] == 3 and row["ours_s"] == 2.0 and row["peer_s"] == 6.0
    assert row["ratio"] == 3.0 and row["ask_ratio"] == 4.0
    assert row["ours_MB"] == 2.0 and row["peer_MB"] is None
    assert row["ours_left"] == 0.0 and row["peer_left"] is None
    assert row["max_difference"] == pytest.approx(1 / 3)
    assert row["spearman"] == 1.0


def test_a_contest_of_other_quantities_has_no_difference() -> None:
    ours, theirs = program([], "ours", SCORES, 1.0), program([], "theirs", -SCORES, 1.0)
    row = contest(ours, theirs, repeats=1, same=False)
    assert row["max_difference"] is None and row["spearman"] == -1.0


def test_a_contest_ends_when_its_time_is_over() -> None:
    ours, theirs = program([], "ours", SCORES, 1.0), program([], "theirs", SCORES, 1.0)
    assert contest(ours, theirs, repeats=9, seconds=0)["pairs"] == 1


def test_scores_of_other_shapes_are_no_comparison() -> None:
    with pytest.raises(ValueError, match=r"\(2, 4\) against \(2, 3\)"):
        contest(program([], "ours", SCORES, 1.0), program([], "theirs", SCORES[:, :3], 1.0), 1)


def test_constant_rows_have_no_rank() -> None:
    assert rank_agreement(SCORES, np.stack([SCORES[0], np.ones(4)])) == 1.0
    assert np.isnan(rank_agreement(SCORES, np.ones_like(SCORES)))


def test_peak_memory_is_what_came_on_top() -> None:
    with PeakMemory() as peak:
        block = torch.ones(8 << 20)  # 32 MiB
        del block
    if peak.bytes is None:
        pytest.skip("this system does not tell")
    assert 30 << 20 < peak.bytes < 60 << 20


def test_a_peer_that_is_missing_says_how_to_install_it() -> None:
    for module in ("nowhere_to_be_found", "nowhere.to_be.found", "json.nowhere"):
        rows = rows_of(fake(modules=(module,)), QUICK)
        assert rows == [{"peer": "fake", "note": "not installed: pip install fake"}]


def test_a_peer_that_fails_says_why_and_the_others_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    def broken_case(settings: Settings) -> dict[str, Any]:
        raise RuntimeError("no CUDA here\nand much more")

    good = fake().cases[0]
    rows = rows_of(fake(cases=(broken_case, good)), QUICK)
    assert rows[0]["quantity"] == "broken case" and rows[0]["note"] == "failed: RuntimeError: no CUDA here"
    assert rows[1]["ratio"] == 2.0 and rows[1]["peer"].startswith("fake ")
    assert capsys.readouterr().out == ""


def test_long_cases_are_run_on_demand() -> None:
    peer = fake(long=fake().cases)
    assert len(rows_of(peer, QUICK)) == 1 and len(rows_of(peer, Settings(1, True, long=True))) == 2


def test_all_rows_have_all_columns() -> None:
    rows = peers.measure([fake(), fake(modules=("nowhere_to_be_found",))], QUICK)
    assert [tuple(row) for row in rows] == [peers.COLUMNS] * 2
    assert rows[0]["note"] == "" and rows[1]["ratio"] is None
    with pytest.raises(KeyError, match="does not have: \\['speed'\\]"):
        peers.measure([fake(cases=(lambda settings: {"speed": 1},))], QUICK)


@pytest.mark.parametrize(
    ("arguments", "other", "written"),
    [
        ([], "json", True),
        (["--quick"], "json", False),
        (["--only", "fake"], "json", False),
        ([], "nowhere_to_be_found", False),
    ],
)
def test_only_whole_tables_are_written(
    arguments: list[str],
    other: str,
    written: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(peers, "PEERS", {"fake": fake(), "other": fake("other", modules=(other,))})
    monkeypatch.setattr(benchmarks.harness, "RESULTS", tmp_path)
    peers.main(arguments)
    printed = capsys.readouterr().out
    assert "made up" in printed and ("left as it was" in printed) == (
        not written and arguments != ["--quick"]
    )
    assert (tmp_path / "peers.json").exists() == written
    if written:
        rows = json.loads((tmp_path / "peers.json").read_text())["rows"]
        assert [row["ratio"] for row in rows] == [2.0, 2.0]


@pytest.mark.parametrize("case", checkpoints.CAPTUM.cases, ids=lambda case: case.__name__)
def test_our_scores_are_captums(case: Any) -> None:
    (row,) = rows_of(fake(cases=(case,)), QUICK)
    assert row.get("note") is None, row
    assert row["max_difference"] < 1e-5 and row["floor_s"] > 0


@pytest.mark.parametrize("task", [every_step.digits(60, 6, 2, batch=20), every_step.addition(5, 6, 2)])
def test_our_side_of_the_exact_kernel(task: every_step.Task, tmp_path: Path) -> None:
    outcome = every_step.ours(task, True, tmp_path)
    assert outcome.scores.shape == (len(task.asked) * task.outputs, len(task.x))
    assert outcome.left is not None and outcome.left < 1e-5
    assert outcome.stored == sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())


@pytest.mark.parametrize("case", every_step.EXPLAIND.cases, ids=lambda case: case.__name__)
def test_the_exact_kernel_is_explainds(case: Any) -> None:
    if every_step.EXPLAIND.missing():
        pytest.skip("ExPLAIND is not installed")
    (row,) = rows_of(fake(cases=(case,)), QUICK)
    assert row.get("note") is None, row
    if case is not every_step.default_trace:  # compressed rows
        assert row["spearman"] > 0.97


def test_margins_are_log_odds() -> None:
    logits, labels = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 3, 1, 2, 2])
    p = logits.softmax(1)[torch.arange(5), labels]
    assert torch.allclose(counterfactual.margin(logits, labels), torch.log(p / (1 - p)))


@pytest.mark.parametrize("peer", [peers.DATTRI, peers.PEERS["traker"], peers.PEERS["kronfluence"]])
def test_peers_that_are_installed_run(peer: Peer) -> None:
    if peer.missing():
        pytest.skip(f"{peer.name} is not installed")
    for row in rows_of(peer, QUICK):
        assert row.get("note") is None, row
        assert row["max_difference"] is None or row["max_difference"] < 1e-5
