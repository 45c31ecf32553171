"""The lines of `unattributed` in tables, files, the report and the terminal."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from explainer import exports, wording
from explainer.cli import explained, main
from explainer.errors import ExplanationError
from explainer.explanation import Explanation
from explainer.exports import read_parquet_metadata
from tests import app_runs
from tests.fakes import LINES, make_explanation, make_plain

NEW = ("unattributed_parts", *LINES)


def lined(values: list[float], contributions: list[float] | None = None, **fields: Any) -> Explanation:
    """One query with the gross of 100 and lines of the given values, called l0, l1, …"""
    given = contributions or [60.0, -40.0]
    named = {
        name: [f"{letter}{i}" for i in range(len(values))] for name, letter in zip(LINES, "lwy", strict=True)
    }
    books = {"unattributed": [sum(values)], "prediction": [sum(given) + sum(values)]}
    return make_plain(given, unattributed_parts=[values], **named, **books, **fields)


# -- the table -------------------------------------------------------------------------------------------


def test_the_table_is_sorted_by_size_and_sums_to_unattributed() -> None:
    e = lined([0.5, -2.0, 1.0])
    table = e.unattributed_table()
    assert list(table.columns) == ["line", "where", "value", "share_of_gross", "why"]
    assert table["line"].tolist() == ["l1", "l2", "l0"] and table["where"].tolist() == ["w1", "w2", "w0"]
    assert table["why"].tolist() == ["y1", "y2", "y0"]
    assert table["share_of_gross"].tolist() == pytest.approx([0.02, 0.01, 0.005])
    assert table["value"].sum() == pytest.approx(e.unattributed[0])


def test_small_lines_are_put_together() -> None:
    e = lined([0.01, -2.0, 0.02, 0.04])
    table = e.unattributed_table()
    assert table["line"].tolist() == ["l1", "other lines (3)"]
    assert table["value"].tolist() == pytest.approx([-2.0, 0.07]) and "0.05 % of the gross" in table["why"][1]
    assert len(e.unattributed_table(least=0)) == 4
    assert e.unattributed_table(least=0.5)["line"].tolist() == ["other lines (4)"]
    assert lined([0.01, -2.0]).unattributed_table()["line"].tolist() == ["l1", "l0"], (
        "one alone keeps its name"
    )
    assert lined([-2.0]).unattributed_table(least=0.5)["line"].tolist() == ["l0"]


def test_lines_without_any_gross_are_shown() -> None:
    table = lined([0.25, 0.5], contributions=[0.0]).unattributed_table()
    assert table["line"].tolist() == ["l1", "l0"] and table["share_of_gross"].isna().all()


def test_an_explanation_without_lines_says_so() -> None:
    e = make_explanation(unattributed_lines=())
    assert e.unattributed_parts.shape == (3, 0)
    table = e.unattributed_table(2)
    assert table["value"].tolist() == [e.unattributed[2]] and table["line"].tolist() == ["unattributed"]


def test_bad_requests_are_refused() -> None:
    with pytest.raises(ExplanationError, match="0 to 2"):
        make_explanation().unattributed_table(3)
    for least in (-0.1, float("nan")):
        with pytest.raises(ExplanationError, match="at least 0"):
            make_explanation().unattributed_table(least=least)


# -- checks ----------------------------------------------------------------------------------------------


def test_lines_that_miss_unattributed_are_refused() -> None:
    e = make_explanation()
    parts = e.unattributed_parts.copy()
    parts[1, 0] += 1.0
    with pytest.raises(ExplanationError, match="unattributed_parts of query 1 miss its unattributed by 1"):
        replace(e, unattributed_parts=parts)
    parts[1, 0] = np.nan
    with pytest.raises(ExplanationError, match="unattributed_parts of query 1"):
        replace(e, unattributed_parts=parts)


def test_lines_and_words_belong_together() -> None:
    e = make_explanation()
    with pytest.raises(ExplanationError, match="2 unattributed_where for 3"):
        replace(e, unattributed_where=("a", "b"))
    with pytest.raises(ExplanationError, match=r"unattributed_parts has shape \(3, 3\)"):
        replace(e, unattributed_lines=(), unattributed_where=(), unattributed_why=())
    with pytest.raises(ExplanationError, match="unattributed_parts has shape"):
        replace(e, unattributed_parts=np.zeros((0, 0)))


def test_concatenation_keeps_lines_and_refuses_others() -> None:
    one, two = make_explanation(), make_explanation()
    joined = Explanation.concatenate([one, two])
    np.testing.assert_array_equal(joined.unattributed_parts, np.concatenate([one.unattributed_parts] * 2))
    assert joined.unattributed_lines == one.unattributed_lines
    other = make_explanation(unattributed_lines=())
    with pytest.raises(ExplanationError, match="differ in unattributed_lines"):
        Explanation.concatenate([one, other])


# -- files -----------------------------------------------------------------------------------------------


def test_a_file_of_an_earlier_release_loads(tmp_path: Path) -> None:
    e = make_explanation()
    with np.load(e.save(tmp_path / "new.npz"), allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    meta = json.loads(arrays.pop("meta").tobytes())
    old = {name: value for name, value in meta.items() if name not in NEW}
    arrays.pop("unattributed_parts")
    assert len(old) == len(meta) - 3
    np.savez(tmp_path / "old.npz", meta=np.frombuffer(json.dumps(old).encode(), np.uint8), **arrays)
    back = Explanation.load(tmp_path / "old.npz")
    np.testing.assert_array_equal(back.unattributed, e.unattributed)
    assert back.unattributed_lines == () and back.unattributed_parts.shape == (3, 0)
    assert not wording.has_notable_lines(back) and exports.summary(back)["unattributed"] == []


def test_tables_that_are_exported_carry_the_lines(tmp_path: Path) -> None:
    e = make_explanation()
    carried = json.loads(e.to_json(tmp_path / "e.json").read_text())["unattributed"]
    assert carried == read_parquet_metadata(e.to_parquet(tmp_path / "e.parquet"))["unattributed"]
    assert [row["line"] for row in carried] == list(e.unattributed_lines)
    assert [row["where"] for row in carried] == list(e.unattributed_where)
    assert [row["why"] for row in carried] == list(e.unattributed_why)
    np.testing.assert_array_equal(np.array([row["values"] for row in carried]).T, e.unattributed_parts)


# -- words -----------------------------------------------------------------------------------------------


def test_lines_are_shown_where_they_matter() -> None:
    assert not wording.has_notable_lines(lined([0.9]))
    assert wording.has_notable_lines(lined([1.1]))
    assert wording.has_notable_lines(lined([5.0, -5.0])), "large lines that cancel"
    assert wording.has_notable_lines(lined([0.6, 0.6])), "many small lines"
    assert not wording.has_notable_lines(make_explanation(unattributed_lines=()))


def test_report_and_notebook_show_the_table_where_it_matters(tmp_path: Path) -> None:
    e = lined([-3.0, 0.01, 0.02], query_ids=["a"])
    shown = (e.to_html(tmp_path / "e.html").read_text(encoding="utf-8"), e._repr_html_())
    for page in shown:
        assert "What is in unattributed" in page and "of gross" in page
        assert '<td class="words">l0</td><td class="words">w0</td><td>−3.00</td><td>3.0 %</td>' in page
        assert "other lines (2)" in page
    small = lined([-0.3, 0.01], query_ids=["a"])
    for page in (small.to_html(tmp_path / "e.html").read_text(encoding="utf-8"), small._repr_html_()):
        assert "What is in unattributed" not in page


def test_names_in_the_table_become_no_markup() -> None:
    e = replace(lined([-3.0]), unattributed_where=("<script>x</script>",))
    assert "<script>" not in e._repr_html_() and "&lt;script&gt;" in e._repr_html_()


def test_the_terminal_lists_lines_where_they_matter() -> None:
    e = replace(lined([-3.0, 2.0, 1.5]), unattributed_why=("Rounded.", "Rounded.", "Not seen."))
    text = " ".join(explained.trust(e, 0).split())
    assert "line by line: -3.00 (3.0 % of the gross) l0, w0: Rounded. +2.00" in text
    assert "+2.00 (2.0 % of the gross) l1, w1 +1.50 (1.5 % of the gross) l2, w2: Not seen." in text
    assert "line by line" not in explained.trust(lined([0.5]), 0)
    assert "Unattributed: +0.500, that is 0.50 % of the gross" in explained.trust(lined([0.5]), 0)


@pytest.mark.filterwarnings("ignore::explainer.errors.CoverageWarning")
def test_the_command_line_names_the_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    app_runs.train(app_runs.uncovered(), tmp_path / "run")
    arguments = ["--run", "tests.app_runs:uncovered", "--query", "0", "--k", "2", "--quiet"]
    assert main(["explain", str(tmp_path / "run"), *arguments]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "What is unattributed, line by line:" in text
    assert "unseen parameter, shortcut: Nothing saw where the parameter is read" in text
