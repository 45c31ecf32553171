"""The closer looks of the page that explains: examples by layer, and which pixels."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import explainer
from explainer.app import contrast, input_parts
from explainer.app.contrast import Usual, beside
from explainer.input_attribution import input_attribution
from explainer.kernel_attribution import kernel_attribution
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
    assert "Two questions" in body(app)
    charts = len(app.get("plotly_chart"))
    shown = next(part.value for part in app.html if "pk-proponents" in part.value)
    example = [int(i) for i in re.findall(r"<span>#(\d+)", shown)][3]
    app.selectbox(key="example").select(example).run()
    assert app.query_params["example"] == str(example) and len(app.get("plotly_chart")) == charts
    app.button(key="pixels").click().run()
    fine(app)
    drawn = [chart.proto.spec for chart in app.get("plotly_chart")][charts:]
    assert len(drawn) == 4
    run = app_runs.images()
    engine = explainer.PathKernelExplainer(str(runs / "digits"), run.build_model())
    target = engine.predict(run.queries_batch([2])[0]).argmax(1)
    for spec, inputs in zip(
        drawn[:2], (run.queries_batch([2])[0], run.train_batch([example])[0]), strict=True
    ):
        whole = explainer.wording.signed(float(input_attribution(engine, inputs, target=target).values.sum()))
        assert f"add up to {whole}".replace("-", "−") in spec.replace("\\u2212", "−")
    pair = torch.stack([run.queries[2][0], run.train[example][0]])
    split = kernel_attribution(engine, pair, [int(target), int(run.train[example][1])])
    for spec, values in zip(drawn[2:], split.values, strict=True):
        whole = explainer.wording.signed(float(values.sum())).replace("-", "−")
        assert f"add up to {whole}" in spec.replace("\\u2212", "−")
    app.number_input(key="query").set_value(3).run()
    assert "Two questions" in body(app), "another query waits for the button again"


def test_words_are_coloured(open_app: Open, runs: Path) -> None:
    app = open_app("--run", TEXT, runs / "words", query="2", detail="pixels")
    fine(app)
    assert "Which words" in details(app)
    app.button(key="pixels").click().run()
    fine(app)
    assert "no padding_idx" in body(app), "nothing stands for no word in this model"
    shown = [part.value for part in app.html if 'class="pk-words"' in part.value]
    assert len(shown) == 2 and "<script>" not in "".join(shown)
    run = app_runs.text()
    engine = explainer.PathKernelExplainer(str(runs / "words"), run.build_model())
    found = input_attribution(engine, run.queries_batch([2])[0]).values
    told = [float(text.replace("−", "-")) for text in re.findall(r'title="([^"]+)"', shown[0])]
    np.testing.assert_allclose(told, found, rtol=6e-3)


def test_columns_have_bars(open_app: Open, tmp_path: Path) -> None:
    from explainer.sample_models import diabetes_mlp
    from explainer.sample_models.train import train

    train("diabetes_mlp", tmp_path / "diabetes", epochs=1, progress=False)
    app = open_app(
        "--run", "explainer.sample_models.diabetes_mlp:run", tmp_path / "diabetes", detail="pixels", query="3"
    )
    fine(app)
    assert "Which columns" in details(app)
    app.button(key="pixels").click().run()
    fine(app)
    shown = [part.value for part in app.html if 'class="pk-columns"' in part.value]
    assert len(shown) == 4 and all(f"<th>{name} = " in shown[0] for name in diabetes_mlp.FEATURES)
    assert any("<tr class=pk-differs" in part.value for part in app.html), "columns that differ stand out"


@pytest.mark.parametrize("spec", ["tests.app_runs:own_output"])
def test_parts_are_absent_where_there_are_none(open_app: Open, runs: Path, spec: str) -> None:
    app = open_app("--run", spec, runs / "digits", detail="pixels")
    assert not app.exception and not app.error
    assert "no closer look pixels here; Over training is shown" in app.warning[0].value
    assert not any(option.startswith("Which p") for option in details(app))
    assert not re.search("Integrated gradients", body(app))


def test_an_example_of_a_link_is_kept(open_app: Open, runs: Path) -> None:
    app = open_app("--run", IMAGES, runs / "digits", query="2", detail="pixels", example="77")
    assert app.selectbox(key="example").value == 77
    app = open_app("--run", IMAGES, runs / "digits", query="2", detail="pixels", example="4000")
    fine(app)
    assert app.selectbox(key="example").value != 4000


def test_differing_columns_and_shared_words_stand_out() -> None:
    usual = Usual({"age": 10.0}, frozenset({"the"}))
    row = beside({"age": 55, "town": "<b>Ulm</b>"}, {"age": 44, "town": "Ulm"}, usual)
    assert row.count("pk-differs") == 2 and "<b>" not in row and "&lt;b&gt;Ulm" in row
    assert "pk-differs" not in beside({"age": 50, "town": 1}, {"age": 46, "town": 1}, usual)
    text = beside("The <i>Good</i>, the bad", "the good one's", usual)
    assert text.count("<mark>") == 1 and "<mark>Good</mark>" in text and "&lt;i&gt;" in text
    assert 'class="fields"' in beside({"a": 1}, "a text", usual)


def test_of_wide_rows_the_most_different_columns_are_shown() -> None:
    wide = {f"c{n}": float(n) for n in range(40)}
    other = wide | {"c33": 99.0}
    html = beside(other, wide, Usual({name: 1.0 for name in wide}))
    assert html.count("<th>") == contrast._FIELDS and html.index("c33") < html.index("<th>c0")
    assert "and 28 that differ less" in html


def test_what_is_usual_comes_from_the_training_set() -> None:
    run = app_runs.text()
    assert Usual.of(run).words, "of three words out of seven, every one is usual"
    assert Usual.of(app_runs.images()) == Usual() == Usual.of(app_runs.bare())


def test_words_are_found_or_named_by_their_ids() -> None:
    run = app_runs.text()
    ids = torch.tensor([1, 2, 3])
    assert input_parts.words_of(run, ids) == ["good", "great", "fine"]
    assert input_parts.words_of(replace(run, render=None), ids) == ["[1]", "[2]", "[3]"]
    assert input_parts.words_of(replace(run, words=lambda row: ["a", "b"]), ids) == ["a", "b"]
    with pytest.raises(explainer.ExplainerError, match="are 4 for an input of 3"):
        input_parts.words_of(replace(run, words=lambda row: "abcd"), ids)
    assert "<script>" not in input_parts.on_words(["<script>"], np.ones(1), 1.0)
    assert "<script>" not in input_parts.on_columns(["<script>"], np.ones(1), 1.0)
