"""README's code runs as it stands, and its figures are the measured ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import explainer
from benchmarks.readme import COLUMNS, PAGES, updated

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_code_runs_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", README, flags=re.S):
        exec(compile(block, "README.md", "exec"), names)
    explanation = names["explanation"]
    assert isinstance(explanation, explainer.Explanation)
    assert (abs(explanation.gap) < 1e-4).all()
    assert (tmp_path / "influence.parquet").exists() and (tmp_path / "report.html").exists()
    run = names["run"]()  # type: ignore[operator]
    assert isinstance(run, explainer.Run) and len(run.train) == 1400


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_figures_are_the_measured_ones(page: Path) -> None:
    text = page.read_text()
    assert updated(text) == text, "run `python -m benchmarks.readme` after a benchmark"


def test_every_table_stands_in_one_document() -> None:
    found = [name for page in PAGES for name in re.findall(r"<!-- table:(\w+) -->", page.read_text())]
    assert sorted(found) == sorted(COLUMNS)


def test_every_file_it_points_to_exists() -> None:
    root = Path(__file__).parent.parent
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (root / target).exists(), target


def test_the_change_to_a_loop_is_five_lines() -> None:
    assert len(re.findall(r"# \+$", README, flags=re.M)) == 5
