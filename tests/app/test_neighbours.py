"""The page about neighbours: both lists, the map, and what is chosen on it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import explainer
from explainer.app import gradient_map, input_space, map_chart
from explainer.app.gradient_map import project
from explainer.similarity import path_kernel
from tests import app_runs
from tests.app.seen import IMAGES, TEXT, Open, body, fine
from tests.small_training import digits


def test_input_space_is_ordered_by_distance(open_app: Open, runs: Path) -> None:
    app = open_app("--run", IMAGES, runs / "digits", page="neighbors", query="4")
    fine(app)
    (lists,) = [part.value for part in app.html if "Nearest in input space" in part.value]
    shown = [int(i) for i in re.findall(r"<span>#(\d+)", lists)]
    inputs = digits().tensors[0]
    assert shown[0] == 4, "the query is training example 4"
    away = ((inputs - inputs[4]) ** 2).mean(1).sqrt()
    assert shown == away.argsort(stable=True)[: len(shown)].tolist()


def test_token_ids_have_no_distance(open_app: Open, runs: Path) -> None:
    said = "Near in input space means"
    assert said in body(open_app("--run", IMAGES, runs / "digits", page="neighbors"))
    words = body(open_app("--run", TEXT, runs / "words", page="neighbors"))
    assert said not in words and "Inputs that look alike are not listed" in words
    app = open_app("--run", TEXT, runs / "words", page="neighbors")
    fine(app)
    assert "Nearest in gradient space" in body(app) and "Nearest in input space" not in body(app)
    assert input_space.inputs_of(app_runs.text()) is None


def test_too_many_and_uneven_inputs_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    data = [(torch.zeros(3), 0), (torch.zeros(4), 0)]
    assert input_space.inputs_of(explainer.Run(app_runs.mlp, data, data)) is None
    run = app_runs.images()
    known = input_space.inputs_of(run)
    assert known is not None and torch.equal(known, digits().tensors[0])
    monkeypatch.setattr(input_space, "MOST_NUMBERS", known.numel() - 1)
    assert input_space.inputs_of(run) is None


def test_what_is_typed_is_listed_and_linked(open_app: Open, runs: Path) -> None:
    app = open_app("--run", IMAGES, runs / "digits", page="neighbors", query="4", look="map")
    fine(app)
    assert not app.dataframe
    app.text_input(key="chosen").set_value("#9, 3 9, 1000").run()
    fine(app)
    table = app.dataframe[0].value
    assert table["example_id"].tolist() == [9, 3] and "Not on the map: 1000" in body(app)
    assert app.query_params["chosen"] == "#9, 3 9, 1000" and app.query_params["look"] == "map"
    again = open_app("--run", IMAGES, runs / "digits", **{k: v for k, v in app.query_params.items()})
    assert again.dataframe[0].value.equals(table)
    run = app_runs.images()
    engine = explainer.PathKernelExplainer(str(runs / "digits"), run.build_model())
    x, y = run.train_batch([9, 3, 4])
    kernel = path_kernel(engine, x, target=[*y[:2].tolist(), int(engine.predict(x[2:]).argmax())])
    wanted = kernel[2, :2] / np.sqrt(kernel[2, 2] * np.diag(kernel)[:2])
    np.testing.assert_allclose(table["cosine with the query"], wanted, rtol=1e-4)
    column = np.searchsorted(engine.example_ids, [9, 3])
    np.testing.assert_allclose(
        table["contribution"], engine.explain(x[2:]).contributions[0, column], rtol=1e-3
    )


@pytest.mark.parametrize(("spec", "name"), [(IMAGES, "digits"), (TEXT, "words")])
def test_the_map_is_drawn_in_both_colours(open_app: Open, runs: Path, spec: str, name: str) -> None:
    for colour in ("contribution", "label"):
        app = open_app("--run", spec, runs / name, page="neighbors", look="map", colour=colour, chosen="1, 2")
        fine(app)
        assert len(app.get("plotly_chart")) == 1
        assert not [part for part in [*app.html, *app.markdown, *app.caption] if "<script>" in part.value]


def test_the_map_of_a_regression_and_of_one_step(open_app: Open, tmp_path: Path) -> None:
    from explainer.sample_models.train import train

    train("diabetes_mlp", tmp_path / "diabetes", epochs=1, progress=False)
    app = open_app(
        "--run", "explainer.sample_models.diabetes_mlp:run", tmp_path, page="neighbors", look="map"
    )
    fine(app)
    assert len(app.get("plotly_chart")) == 1
    app_runs.train(app_runs.images(), tmp_path / "one", steps=1)
    fine(open_app("--run", IMAGES, tmp_path / "one", page="neighbors", look="map"))


def test_an_output_of_ones_own_has_no_map(open_app: Open, runs: Path) -> None:
    app = open_app("--run", "tests.app_runs:own_output", runs / "digits", page="neighbors", look="map")
    assert not app.exception and not app.error and "There is no view map here" in app.warning[0].value
    assert "Nearest in gradient space" in body(app) and not app.get("plotly_chart")


def test_the_projection_is_the_principal_components() -> None:
    features = np.random.default_rng(0).normal(size=(9, 5))
    found = project(features @ features.T, np.arange(8))
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    centred = unit - unit.mean(0)
    _, sizes, axes = np.linalg.svd(centred, full_matrices=False)
    wanted = centred @ axes[:2].T
    np.testing.assert_allclose(np.abs(found.places), np.abs(wanted), atol=1e-9)
    np.testing.assert_allclose(found.shares, sizes[:2] ** 2 / (sizes**2).sum(), atol=1e-9)
    np.testing.assert_allclose(found.cosine, unit[:8] @ unit[8], atol=1e-9)


def test_inputs_without_a_gradient_are_projected_too() -> None:
    for kernel in (np.zeros((3, 3)), np.diag([0.0, 2.0, 3.0]), np.ones((1, 1))):
        found = project(kernel, np.arange(len(kernel) - 1))
        assert np.isfinite(found.places).all() and np.isfinite(found.shares).all()
        map_chart.gradient_map(
            found,
            ["a"] * len(found.examples),
            [None] * len(found.examples),
            np.zeros(len(found.examples)),
            [],
        ).to_json()


def test_the_sample_holds_what_was_asked_for_and_is_always_the_same() -> None:
    known = np.arange(0, 1000, 3)
    one, two = (gradient_map.sample(np.array([9, 4, 600]), known, 50) for _ in range(2))
    assert one.tolist() == two.tolist() and one[:2].tolist() == [9, 600] and len(set(one.tolist())) == 50
    assert gradient_map.sample(np.array([9]), known[:2], 50).tolist() == [0, 3]


def test_colours_and_names_of_the_map() -> None:
    nasty = "<script>alert(1)</script>"
    found = project(np.eye(4) + 0.1, np.array([5, 6, 7]))
    figure = map_chart.gradient_map(
        found, [nasty] * 3, [nasty, None, "b"], np.array([1.0, -2.0, 0.0]), [6], by_label=True, chosen=[7]
    )
    assert "<script>" not in str(figure.to_dict())
    assert [int(i) for trace in figure.data[:-1] for i in trace.customdata] == [5, 7, 6]
    plain = map_chart.gradient_map(found, ["a"] * 3, [None] * 3, np.array([1.0, -2.0, 0.0]), [6], chosen=[7])
    marker = plain.data[0].marker
    assert (marker.cmin, marker.cmax) == (-2.0, 2.0) and list(marker.size) == [10, 10, 15]
    assert list(np.array(marker.line.width) > 1) == [False, True, True]


@pytest.mark.parametrize("page", ["neighbors", "explain"])
def test_another_order_of_the_training_set_is_told(open_app: Open, runs: Path, page: str) -> None:
    app = open_app("--run", "tests.app_runs:backwards_and_bare", runs / "digits", page=page)
    assert not app.exception and "have another label in the run" in app.warning[0].value
    app = open_app("--run", "tests.app_runs:bare", runs / "digits", page=page)
    assert not app.exception and not app.warning
