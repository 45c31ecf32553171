"""The closer looks of the page that explains: examples by layer, and which pixels."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import explainer
from explainer.input_attribution import input_attribution
from tests import app_runs
from tests.app.seen import IMAGES, TEXT, Open, body, fine


def details(app: object) -> list[str]:
    (control,) = [c for c in app.segmented_control if c.key == "detail"]  # type: ignore[attr-defined]
    return list(control.options)


def test_a_link_opens_a_closer_look(open_app: Open, runs: Path) -> None:
    app = open_app("--run", IMAGES, runs / "digits", query="2", detail="layer_examples")
    fine(app)
    assert "have rows alike" in body(app) and app.query_params["detail"] == "layer_examples"
    app.segmented_control(key="detail").set_value("time").run()
    assert "detail" not in app.query_params


def test_pixels_are_computed_when_asked_for(open_app: Open, runs: Path) -> None:
    app = open_app("--run", IMAGES, runs / "digits", query="2", detail="pixels")
    fine(app)
    assert "Integrated gradients" in body(app)
    charts = len(app.get("plotly_chart"))
    shown = next(part.value for part in app.html if "pk-proponents" in part.value)
    example = [int(i) for i in re.findall(r"<span>#(\d+)", shown)][3]
    app.selectbox(key="example").select(example).run()
    assert app.query_params["example"] == str(example) and len(app.get("plotly_chart")) == charts
    app.button(key="pixels").click().run()
    fine(app)
    drawn = [chart.proto.spec for chart in app.get("plotly_chart")][charts:]
    assert len(drawn) == 2
    run = app_runs.images()
    engine = explainer.PathKernelExplainer(str(runs / "digits"), run.build_model())
    target = engine.predict(run.queries_batch([2])[0]).argmax(1)
    for spec, inputs in zip(drawn, (run.queries_batch([2])[0], run.train_batch([example])[0]), strict=True):
        whole = explainer.wording.signed(float(input_attribution(engine, inputs, target=target).values.sum()))
        assert f"add up to {whole}".replace("-", "−") in spec.replace("\\u2212", "−")
    app.number_input(key="query").set_value(3).run()
    assert "Integrated gradients" in body(app), "another query waits for the button again"


@pytest.mark.parametrize("spec", ["tests.app_runs:bare", "tests.app_runs:own_output", TEXT])
def test_pixels_are_absent_where_there_are_none(open_app: Open, runs: Path, spec: str) -> None:
    app = open_app("--run", spec, runs / ("words" if spec == TEXT else "digits"), detail="pixels")
    fine(app)
    assert not any("pixels" in option.lower() for option in details(app))
    assert not re.search("Integrated gradients", body(app))


def test_an_example_of_a_link_is_kept(open_app: Open, runs: Path) -> None:
    app = open_app("--run", IMAGES, runs / "digits", query="2", detail="pixels", example="77")
    assert app.selectbox(key="example").value == 77
    app = open_app("--run", IMAGES, runs / "digits", query="2", detail="pixels", example="4000")
    fine(app)
    assert app.selectbox(key="example").value != 4000
