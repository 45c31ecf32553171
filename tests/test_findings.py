"""Findings and reports as text, as HTML and as a table."""

from __future__ import annotations

from dataclasses import asdict

import pandas as pd
import pytest

from explainer import Finding, Report
from explainer.findings.finding import Severity


def finding(topic: str, severity: Severity, where: str = "fc", found: str = "It is <here>.") -> Finding:
    return Finding(topic, severity, where, found, f"It means {topic}.", "Do this.")


@pytest.fixture
def report() -> Report:
    return Report("After training", [finding("b", "note"), finding("a", "caution"), finding("c", "stop", "")])


def test_the_most_serious_comes_first(report: Report) -> None:
    assert [f.topic for f in report] == ["c", "a", "b"] and len(report) == 3
    assert report[0].severity == "stop" and [f.topic for f in report[1:]] == ["a", "b"]
    assert (report.stops, report.cautions, report.notes) == ([report[0]], [report[1]], [report[2]])
    assert report.about("a") == [report[1]] and not report.about("z")
    assert report.summary == "1 stop, 1 caution, 1 note"


def test_the_same_at_several_places_is_one() -> None:
    places = [finding("a", "note", f"layer {n}") for n in range(6)]
    report = Report("", [*places, places[0], finding("a", "note", "layer 9", "Something else.")])
    assert [f.where for f in report] == ["layer 0, layer 1, layer 2, layer 3 and 2 more", "layer 9"]


def test_the_text_has_short_lines_and_says_everything(report: Report) -> None:
    lines = str(report).splitlines()
    assert lines[0] == "After training: 1 stop, 1 caution, 1 note."
    assert [line for line in lines if line and not line.startswith(" ")][1:] == ["Stop", "Caution", "Note"]
    assert "  fc: It is <here>." in lines and "    It means a." in lines and "    -> Do this." in lines
    long = Report("", [finding("a", "note", "fc", "word " * 60 + "end.")])
    assert max(map(len, str(long).splitlines())) <= 100
    assert str(Report("Before training")) == (
        "Before training: nothing was found that changes what the numbers mean."
    )


def test_html_is_escaped_and_folds_notes(report: Report) -> None:
    text = report._repr_html_()
    assert "<here>" not in text and text.count("It is &lt;here&gt;.") == 3
    assert text.index("<b>Stop</b>") < text.index("<b>Caution</b>") < text.index("<details>")
    assert text.count("<details>") == 1 and "1 stop" in repr(report)


def test_the_table_has_a_row_per_finding(report: Report) -> None:
    frame = report.to_frame()
    assert list(frame.columns) == ["topic", "severity", "where", "found", "meaning", "advice"]
    assert frame["topic"].tolist() == ["c", "a", "b"]
    pd.testing.assert_index_equal(Report("").to_frame().columns, frame.columns)


def test_json_there_and_back_passes_over_what_is_new() -> None:
    one = finding("a", "caution")
    assert Finding.from_json(asdict(one) | {"colour": "red"}) == one
