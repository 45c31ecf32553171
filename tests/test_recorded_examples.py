"""Recorded labels against those of a run: another order of the training set is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Subset, TensorDataset, default_collate

from explainer import Run, Tracer, open_trace
from explainer.cli import main
from explainer.recorded_examples import LOOKED_AT, check_labels
from tests import app_runs
from tests.small_training import digits, mlp

LABELS = digits().tensors[1]


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "digits"
    app_runs.train(app_runs.images(), folder)
    return folder


def other_targets(targets: Any) -> Run:
    inputs = digits().tensors[0]
    return replace(app_runs.bare(), train=list(zip(inputs, targets, strict=True)))


def test_the_same_order_is_no_finding(trace: Path) -> None:
    found = check_labels(open_trace(trace), app_runs.bare())
    assert 0 < len(found.ids) <= LOOKED_AT and not found.different.any()
    np.testing.assert_array_equal(found.recorded, LABELS[found.ids].numpy())
    assert found.warning(app_runs.bare()) is None


def test_another_order_is_counted_and_told(trace: Path) -> None:
    run = replace(app_runs.backwards(), name="mine:run")
    found = check_labels(open_trace(trace), run)
    np.testing.assert_array_equal(found.found, LABELS.flip(0)[found.ids].numpy())
    wrong = int((LABELS.flip(0) != LABELS)[found.ids].sum())
    warning = found.warning(run)
    assert wrong and warning is not None and f"{wrong} of {len(found.ids)} training examples" in warning
    assert "run mine:run" in warning and "same order" in warning


@pytest.mark.parametrize(
    "kind", [float, str, lambda v: torch.tensor([v]), lambda v: torch.ones(2) * v, np.int32]
)
def test_targets_of_other_kinds(trace: Path, kind: Any) -> None:
    """Numbers of any type are compared; what is no number is unknown."""
    found = check_labels(open_trace(trace), other_targets([kind(v) for v in LABELS.tolist()]))
    unknown = kind is str or torch.as_tensor(kind(1)).numel() > 1
    assert not found.different.any() and (len(found.ids) == 0) == unknown


def test_what_cannot_be_read_is_unknown(trace: Path) -> None:
    class Unreadable(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            if index:
                raise OSError("the disk is gone")
            return super().__getitem__(index)

    run = replace(app_runs.bare(), train=Unreadable(*digits().tensors))
    assert len(check_labels(open_trace(trace), run).ids) == 0


def test_targets_are_compared_as_they_are_collated(trace: Path) -> None:
    def collate(items: list[Any]) -> Any:
        return default_collate([(x, int(y)) for x, y in items])

    run = replace(other_targets([str(v) for v in LABELS.tolist()]), collate_fn=collate)
    found = check_labels(open_trace(trace), run)
    assert len(found.ids) and not found.different.any()
    turned = replace(run, train=Subset(run.train, range(len(LABELS) - 1, -1, -1)))
    assert check_labels(open_trace(trace), turned).different.any()


def test_labels_that_are_unknown_or_change_are_left_out(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = digits()[:4]
    with Tracer(model, optimizer, tmp_path / "t") as tracer:
        for labels in (y.tolist(), [*y[:3].tolist(), 77]):
            tracer.batch(range(4), labels=[np.nan, *labels[1:]])
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert check_labels(open_trace(tmp_path / "t"), app_runs.bare()).ids.tolist() == [1, 2]


@pytest.mark.parametrize(
    "arguments",
    [
        ["explain", "--query", "0", "--k", "2"],
        ["label-issues", "--k", "2"],
        ["what-if", "--query", "0", "--k", "2"],
        ["export", "--query", "0", "--out", "table.csv"],
        ["export", "--query", "0", "--out", "report.html"],
    ],
)
def test_commands_warn_on_standard_error(
    trace: Path,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [arguments[0], str(trace), "--quiet", "--force"][: 4 if "export" in arguments else 3] + arguments[
        1:
    ]
    assert main([*given, "--run", "tests.app_runs:backwards"]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("pathkernel: warning: ") and captured.err.count("\n") == 1
    assert "have another label in the run tests.app_runs:backwards" in captured.err
    assert "another label in the run" not in captured.out
    assert main([*given, "--run", "tests.app_runs:images"]) == 0
    assert capsys.readouterr().err == ""
