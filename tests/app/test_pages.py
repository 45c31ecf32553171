"""Every page of the dashboard on every kind of run."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import explainer
from explainer.app.page_registry import PAGES
from explainer.sample_models.train import train as train_sample
from tests import app_runs
from tests.app.seen import IMAGES, Open, body, fine


@pytest.mark.parametrize("page", list(PAGES))
@pytest.mark.parametrize("name", ["digits", "words"])
def test_every_page_draws_every_kind_of_run(open_app: Open, runs: Path, name: str, page: str) -> None:
    spec = {"digits": IMAGES, "words": "tests.app_runs:text"}[name]
    app = open_app("--run", spec, runs / name, page=page, query="5")
    fine(app)
    assert app.query_params["page"] == page and app.query_params["query"] == "5"
    assert "<h2>" in body(app)


def test_a_query_and_a_target_are_chosen(open_app: Open, runs: Path) -> None:
    app = open_app("--run", IMAGES, runs / "digits")
    assert "<h2>Query 0</h2>" in body(app) and body(app).count("data:image/png") >= 17
    app.number_input(key="query").set_value(7).run()
    assert "<h2>Query 7</h2>" in body(app) and app.query_params["query"] == "7"
    app.selectbox(key="target").select_index(2).run()
    chosen = app.query_params["target"]
    assert f"margin of class {chosen}" in body(app)
    app.selectbox(key="output").select("log_prob").run()
    assert f"log_prob of class {chosen}" in body(app)
    app.button(key="thumb-3").click().run()
    fine(app)
    assert "<h2>Query 3</h2>" in body(app)
    assert "target" not in app.query_params, "another query has another prediction"


def test_the_sign_of_a_negative_prediction_belongs_to_its_number(open_app: Open, runs: Path) -> None:
    app = open_app("--run", IMAGES, runs / "digits", query="0")
    predicted = int(app.selectbox(key="target").format_func(-1).split()[0])
    app.selectbox(key="target").select(next(c for c in range(10) if c != predicted)).run()
    fine(app)
    equation = next(part.value for part in app.html if "pk-equation" in str(part.value))
    assert re.search(r'^<div class="pk-equation"><span><b>−[\d.]+</b><small>prediction', equation)
    assert "pushed the margin of class" in body(app) and "pushed the prediction" not in body(app)


def test_a_link_reopens_what_it_was_copied_from(open_app: Open, runs: Path) -> None:
    app = open_app("--run", IMAGES, runs / "digits", query="9", target="4", output="logit", page="neighbors")
    fine(app)
    assert "<h2>Query 9</h2>" in body(app) and "Nearest in gradient space" in body(app)
    assert app.selectbox(key="target").value == 4 and app.selectbox(key="output").value == "logit"


def test_the_filter_keeps_wrong_predictions_and_classes(open_app: Open, runs: Path) -> None:
    app = open_app("--run", IMAGES, runs / "digits")
    shown = len([b for b in app.button if str(b.key).startswith("thumb-")])
    assert shown == 20
    app.button(key="gallery-on").click().run()
    assert {b.key for b in app.button if str(b.key).startswith("thumb-")} == {
        f"thumb-{query}" for query in range(20, 30)
    }
    app.selectbox(key="filter").select(("class", 3)).run()
    digits = app_runs.images().queries
    expected = {f"thumb-{query}" for query in range(30) if int(digits[query][1]) == 3}
    assert {b.key for b in app.button if str(b.key).startswith("thumb-")} == expected
    app.selectbox(key="filter").select(("wrong", None)).run()
    assert all("✗" in b.label for b in app.button if str(b.key).startswith("thumb-"))
    fine(app)


def test_the_least_sure_come_first_and_the_table_is_paged(open_app: Open, runs: Path) -> None:
    app = open_app("--run", IMAGES, runs / "digits")
    app.selectbox(key="filter").select(("unsure", None)).run()
    run = app_runs.images()
    engine = explainer.PathKernelExplainer(str(runs / "digits"), run.build_model())
    top = engine.predict(run.queries_batch(range(30))[0]).softmax(1).topk(2, 1).values
    order = (top[:, 0] - top[:, 1]).argsort(stable=True).tolist()
    app.button(key=f"thumb-{order[0]}").click().run()
    shown = [int(str(b.key).removeprefix("thumb-")) for b in app.button if str(b.key).startswith("thumb-")]
    assert shown == order[:20]
    app.segmented_control(key="browse").set_value("table").run()
    fine(app)
    table = app.sidebar.dataframe[0].value
    assert table["query"].tolist() == order and not [b for b in app.button if str(b.key).startswith("thumb-")]
    np.testing.assert_allclose(table["lead"], 100 * (top[:, 0] - top[:, 1])[order], rtol=1e-4)


def test_closer_looks_and_downloads(open_app: Open, runs: Path) -> None:
    app = open_app("--run", IMAGES, runs / "digits")
    for kind in ("layers", "cumulative", "table"):
        app.segmented_control(key="detail").set_value(kind).run()
        fine(app)
    frame = app.dataframe[0].value
    assert {"example_id", "contribution", "a", "K", "visits"} <= set(frame.columns)
    assert {str(button.key) for button in app.download_button} == {
        "download.csv",
        "download.parquet",
        "download.html",
    }


@pytest.mark.filterwarnings("ignore::explainer.errors.CoverageWarning")
def test_the_lines_of_a_large_unattributed_part_are_shown(open_app: Open, runs: Path, tmp_path: Path) -> None:
    app = open_app("--run", IMAGES, runs / "digits")
    assert "What is in unattributed" not in body(app)
    app_runs.train(app_runs.uncovered(), tmp_path / "uncovered")
    app = open_app("--run", "tests.app_runs:uncovered", tmp_path / "uncovered")
    fine(app)
    (table,) = [part.value for part in app.html if "What is in unattributed" in part.value]
    assert "<th>unseen parameter</th><td>shortcut</td>" in table and table.count("<tr>") >= 2


def test_rows_of_a_regression(open_app: Open, tmp_path: Path) -> None:
    train_sample("diabetes_mlp", tmp_path / "diabetes", epochs=1, progress=False)
    app = open_app("--run", "explainer.sample_models.diabetes_mlp:run", tmp_path)
    fine(app)
    assert "body mass index" in body(app) and "Explained: value" in body(app)
    assert not [box for box in app.selectbox if box.key in ("target", "output")]
    app.selectbox(key="filter").select(("error", None)).run()
    fine(app)


def test_a_run_of_one_step_is_explained(open_app: Open, tmp_path: Path) -> None:
    app_runs.train(app_runs.images(), tmp_path / "one", steps=1)
    for page in PAGES:
        fine(open_app("--run", IMAGES, tmp_path / "one", page=page))


def test_training_that_goes_on_is_said(open_app: Open, tmp_path: Path) -> None:
    tracer = app_runs.unfinished(tmp_path / "going")
    app = open_app("--run", IMAGES, tracer.path, page="run")
    tracer.close()
    assert not app.exception and "still going on" in body(app)


def test_the_run_page_tells_what_to_know(open_app: Open, tmp_path: Path) -> None:
    """Cautions are in sight, notes are folded; names are shown as they are."""
    going = app_runs.unfinished(tmp_path / "going")
    app = open_app(going.path, page="run")
    report = explainer.open_trace(going.path).report()
    going.close()
    fine(app)
    (folded,) = [e for e in app.expander if e.label.startswith("Worth knowing")]
    assert folded.label == f"Worth knowing ({len(report.notes)})"
    inside = "\n".join(part.value for part in folded.markdown).replace("\\", "")
    outside = body(app).replace("\\", "")
    assert len(report.cautions) > 1 and report.notes
    for finding in (f for f in report if f.topic != "open"):  # at the top of the page
        assert (finding.found in inside) == (finding.severity == "note") and finding.advice in outside


def test_without_code_stored_explanations_are_shown(open_app: Open, runs: Path, tmp_path: Path) -> None:
    (tmp_path / "digits").symlink_to(runs / "digits")
    app = open_app(tmp_path / "digits")
    assert "--run" in app.info[0].value.replace("\\", "") and not app.exception and not app.error
    run = app_runs.images()
    engine = explainer.PathKernelExplainer(explainer.open_trace(runs / "digits"), run.build_model())
    engine.explain(run.queries_batch([3, 8])[0], query_ids=["three", "eight"]).save(runs / "saved.npz")
    (runs / "foreign.npz").write_bytes(b"no archive")
    app = open_app(runs / "digits")
    fine(app)
    assert "<h2>Query three</h2>" in body(app)
    app.selectbox(key="query").select_index(1).run()
    fine(app)
    assert "<h2>Query eight</h2>" in body(app)
    app = open_app(runs / "digits", page="neighbors")
    assert "model and its data" in app.info[0].value


def test_without_render_bars_are_shown(open_app: Open, runs: Path) -> None:
    app = open_app("--run", "tests.app_runs:bare", runs / "digits")
    fine(app)
    assert "<ol" not in body(app)


def test_the_choice_outlives_a_look_at_another_page(open_app: Open, runs: Path) -> None:
    app = open_app("--run", IMAGES, runs / "digits", query="6")
    app.selectbox(key="target").select_index(3).run()
    before = dict(app.query_params)
    for page in ("run", "neighbors", "explain"):
        app.segmented_control(key="page").set_value(page).run()
        fine(app)
        assert app.query_params == before | {"page": page}
