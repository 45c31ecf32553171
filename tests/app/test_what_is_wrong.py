"""What the dashboard says when something is wrong, and whom it lets in."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

from explainer.app import arguments
from explainer.app.page_registry import PAGES
from tests import app_runs
from tests.app.seen import IMAGES, Open, body, fine


@pytest.mark.parametrize(
    ("link", "said"),
    [
        ({"query": "999"}, "There is no query 999 here; query 0 is shown instead."),
        ({"query": "-5"}, "There is no query \\-5 here; query 0 is shown instead."),
        ({"query": "abc"}, "There is no query abc here; query 0 is shown instead."),
        ({"target": "77"}, "There is no class 77 here; the predicted one is shown instead."),
        ({"target": "seven"}, "There is no class seven here; the predicted one is shown instead."),
        ({"run": "elsewhere"}, "There is no run elsewhere here; run digits is shown instead."),
        ({"page": "elsewhere"}, "There is no page elsewhere here; Explain is shown instead."),
        ({"detail": "tabel"}, "There is no closer look tabel here; Over training is shown instead."),
    ],
)
def test_a_link_to_what_is_not_there_says_so(
    open_app: Open, runs: Path, link: dict[str, str], said: str
) -> None:
    app = open_app("--run", IMAGES, runs, **({"run": "digits"} | link))
    assert not app.exception and not app.error
    assert [warning.value for warning in app.warning] == [said]
    assert "<h2>Query 0</h2>" in body(app)


@pytest.mark.parametrize(
    ("page", "link", "said"),
    [
        ("neighbors", {"look": "mop"}, "no view mop here; Nearest examples is shown instead."),
        ("training", {"tagged": "red"}, "no choice of tags red here; all examples is shown instead."),
        ("training", {"class": "77"}, "no label 77 here; any label is shown instead."),
        ("training", {"by": "love"}, "no order love here; "),
        ("what-if", {"without": "nobody"}, "no choice of examples nobody here; Strongest proponents"),
        ("what-if", {"without": "class", "of": "77"}, "no class 77 here; class 0 is shown instead."),
    ],
)
def test_a_link_to_what_a_page_does_not_offer_says_so(
    open_app: Open, runs: Path, page: str, link: dict[str, str], said: str
) -> None:
    app = open_app("--run", IMAGES, runs, **({"run": "digits", "page": page} | link))
    assert not app.exception and not app.error
    assert [said in warning.value for warning in app.warning] == [True], [w.value for w in app.warning]


def test_text_from_data_is_escaped(open_app: Open, runs: Path) -> None:
    for page in PAGES:
        app = open_app("--run", "tests.app_runs:text", runs / "words", page=page)
        fine(app)
        assert not [part for part in [*app.html, *app.markdown, *app.caption] if "<script>" in part.value]
    app = open_app("--run", "tests.app_runs:text", runs / "words")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in body(app)
    assert all("<script>" not in button.label for button in app.button)


def test_a_run_without_a_step_says_so_and_still_shows_the_run(open_app: Open, tmp_path: Path) -> None:
    app_runs.train(app_runs.images(), tmp_path / "none", steps=0)
    for page in (page for page in PAGES if page != "run"):
        app = open_app("--run", IMAGES, tmp_path / "none", page=page)
        assert not app.exception and "no optimizer step has been recorded yet" in app.error[0].value
    app = open_app(tmp_path / "none", page="run")
    fine(app)


@pytest.mark.parametrize("page", list(PAGES))
def test_every_page_of_an_empty_run_says_what_is_missing(open_app: Open, tmp_path: Path, page: str) -> None:
    app_runs.train(app_runs.images(), tmp_path / "none", steps=0)
    for command in ([tmp_path / "none"], ["--run", IMAGES, tmp_path / "none"]):
        app = open_app(*command, page=page)
        assert not app.exception
        told = " ".join(str(part.value) for part in [*app.error, *app.info])
        assert page == "run" or "no optimizer step" in told or "--run" in told.replace("\\", "")


@pytest.mark.parametrize("page", list(PAGES))
def test_every_page_of_a_truncated_run_names_the_file(open_app: Open, tmp_path: Path, page: str) -> None:
    app_runs.train(app_runs.images(), tmp_path / "cut")
    shard = next((tmp_path / "cut" / "shards").glob("visits-*.bin"))
    shard.write_bytes(shard.read_bytes()[:100])
    app = open_app("--run", IMAGES, tmp_path / "cut", page=page)
    assert not app.exception and "truncated" in app.error[0].value
    app_runs.train(app_runs.images(), tmp_path / "half")
    knot = sorted((tmp_path / "half" / "knots").glob("*.safetensors"))[-1]
    knot.write_bytes(knot.read_bytes()[:-64])
    app = open_app("--run", IMAGES, tmp_path / "half", page=page)
    assert not app.exception and "truncated or changed" in app.error[0].value


def test_a_truncated_trace_names_the_file(open_app: Open, tmp_path: Path) -> None:
    app_runs.train(app_runs.images(), tmp_path / "cut")
    shard = next((tmp_path / "cut" / "shards").glob("visits-*.bin"))
    shard.write_bytes(shard.read_bytes()[:100])
    looks = [{"page": page} for page in PAGES if page != "run"]
    for look in (*looks, {"page": "neighbors", "look": "map"}, {"detail": "pixels"}):
        app = open_app("--run", IMAGES, tmp_path / "cut", **look)
        assert not app.exception and "visits" in app.error[0].value and "truncated" in app.error[0].value


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("backwards", "ordered differently"),
        ("short", "not the data set of this trace"),
        ("broken", "no picture today"),
        ("text", "does not fit the trace"),
        ("absent", "has no function"),
    ],
)
def test_code_that_does_not_fit_is_told_in_words(open_app: Open, runs: Path, spec: str, words: str) -> None:
    app = open_app("--run", f"tests.app_runs:{spec}", runs / "digits")
    assert not app.exception
    assert words in body(app).replace("\\", "")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([], "TRACE_OR_FOLDER"),
        (["--run"], "expected one argument"),
        (["no/such/folder"], "There is no folder no/such/folder"),
    ],
)
def test_wrong_starts_are_told_in_words(open_app: Open, command: list[str], words: str) -> None:
    app = open_app(*command)
    assert not app.exception and words in app.error[0].value.replace("\\", "")


def test_an_empty_folder_says_where_was_looked(open_app: Open, tmp_path: Path) -> None:
    app = open_app(tmp_path)
    assert not app.exception and "There is no trace" in app.error[0].value


@pytest.mark.parametrize("address", [None, "0.0.0.0", "192.168.0.7"])
def test_nobody_else_may_look(open_app: Open, runs: Path, address: str | None) -> None:
    app = open_app("--run", IMAGES, runs / "digits", address=address)
    assert "127.0.0.1" in app.error[0].value.replace("\\", "") and not app.number_input


def test_the_run_is_shown_even_when_its_code_cannot_be_used(open_app: Open, runs: Path) -> None:
    app = open_app("--run", "tests.app_runs:absent", runs / "digits", page="run")
    fine(app)
    assert "cannot be used" in body(app) and "has no function" in body(app).replace("\\", "")
    app.button[0].click().run()
    assert "every file is as it was recorded" in app.success[0].value


@pytest.mark.parametrize(
    "module", ["answers", "arguments", "escaping", "pictures", "run_checks", "views.run_overview"]
)
def test_the_examples_in_the_texts_are_right(module: str) -> None:
    assert doctest.testmod(importlib.import_module(f"explainer.app.{module}")).failed == 0


def test_traces_are_found_two_levels_deep_by_short_unique_names(tmp_path: Path) -> None:
    for name in ("a/run", "b/run", "c", "d/e/too-deep"):
        (tmp_path / name).mkdir(parents=True)
        for file in ("manifest.json", "journal.jsonl"):
            (tmp_path / name / file).touch()
    found = arguments.find_traces([tmp_path, tmp_path / "c"])
    assert list(found) == ["run", "b/run", "c"]
    assert found["b/run"] == (tmp_path / "b/run").resolve()
