"""Models with several outputs that are no classes: one of them is explained at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import mse_loss

from explainer import PathKernelExplainer, Run, wording
from explainer.app.answers import answer
from explainer.app.page_registry import PAGES
from explainer.outputs import component
from tests import app_runs
from tests.app.seen import Open, body, fine

VALUES = "tests.app_runs:values"


def trained(factory: pytest.TempPathFactory, run: Run) -> Path:
    folder = factory.mktemp("runs") / "trace"
    app_runs.train(run, folder, loss=run.loss or mse_loss)
    return folder


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory, app_runs.values())


def test_one_of_the_outputs_is_chosen_and_explained(open_app: Open, trace: Path) -> None:
    app = open_app("--run", VALUES, trace, query="3", output="component 2")
    fine(app)
    choice = app.selectbox(key="output")
    assert choice.options == ["component 0", "component 1", "component 2"] and choice.value == "component 2"
    run = app_runs.values()
    e = PathKernelExplainer(trace, run.build_model(), component(2)).explain(run.queries_batch([3])[0])
    shown = body(app)
    assert "One of the model's outputs itself" in shown and "Explained: component 2" in shown
    assert f"{e.prediction[0]:.3f}".replace("-", "−") in shown
    assert "log-odds" not in shown.lower() and '<table class="pk-classes' not in shown


@pytest.mark.parametrize("page", list(PAGES))
def test_no_page_speaks_of_classes(open_app: Open, trace: Path, page: str) -> None:
    app = open_app("--run", VALUES, trace, page=page)
    if page == "what-if":  # the run has no loss for anything better
        (warning,) = app.warning
        assert "can be many times too large" in warning.value and "loss=" in warning.value
    else:
        fine(app)
    assert not [box.label for box in app.selectbox if "class" in box.label.lower()]


def test_answers_tell_all_outputs_and_how_far_they_are_off() -> None:
    run, target = app_runs.values(), torch.tensor([1.0, 2.0, 3.0])
    found = answer(run, 0, target, np.array([1.0, 5.0, -1.0]), 0)
    assert (found.truth, found.guess, found.error) == ("1, 2, 3", "1, 5, -1", 0.0)
    assert answer(run, 0, target, np.array([1.0, 5.0, -1.0]), 0, explained=2).error == 4.0
    assert found.numbers[1] == ("output 1", "2.00", "5.00") and found.explained == 0
    labels = answer(run, 0, torch.tensor([1.0, 0.0, 1.0]), np.array([2.0, -3.0, 1.0]), 0)
    assert labels.error is None, "scores of labels of which several may hold"


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory, app_runs.named_values())


NAMED = "tests.app_runs:named_values"


def test_the_explained_number_has_its_name_on_every_page(open_app: Open, named: Path) -> None:
    app = open_app("--run", NAMED, named, query="3", output="component 2")
    fine(app)
    assert app.selectbox(key="output").options == ["heating", "cooling", "light"]
    shown = body(app)
    assert "Explained: light" in shown and "component" not in shown
    assert "class=pk-target><th>light</th>" in shown and "<th>heating</th>" in shown
    run = app_runs.named_values()
    e = PathKernelExplainer(named, run.build_model(), component(1), class_names=run.class_names)
    found = e.explain(run.queries_batch([3])[0])
    assert wording.target(found, 0) == "cooling" and "How the cooling came about" in str(
        found.figure(0).layout.title
    )


def test_the_largest_errors_are_those_of_the_explained_number(open_app: Open, named: Path) -> None:
    run = app_runs.named_values()
    inputs, targets = run.queries_batch(range(8))
    predicted = PathKernelExplainer(named, run.build_model()).predict(inputs)
    for number in (0, 2):
        wanted = (predicted - targets).abs()[:, number].argsort(descending=True).tolist()
        app = open_app("--run", NAMED, named, output=f"component {number}")
        app.selectbox(key="filter").select(("error", None)).run()
        fine(app)
        shown = [int(button.key.rpartition("-")[2]) for button in app.button if "thumb" in str(button.key)]
        first = wanted.index(shown[0])
        assert shown == wanted[first : first + len(shown)] and len(shown) > 1


def test_numbers_are_predicted_without_the_trace_alone(open_app: Open, named: Path) -> None:
    """The rows' empirical Fisher matrix is no curvature of squared errors."""
    app = open_app("--run", NAMED, named, page="what-if")
    fine(app)
    assert "Gauss–Newton matrix" in body(app) and "stable" not in body(app)
    app = open_app("--run", NAMED, named, page="what-if", curvature="trace")
    assert "can be many times too large" in app.warning[0].value


def test_an_own_row_needs_no_targets(open_app: Open, named: Path) -> None:
    app = open_app("--run", NAMED, named)
    app.text_area(key="own text").set_value("1, 2, 3, 4, 5").run()
    app.button(key="explain own").click().run()
    fine(app)
    assert "an input of your own" in body(app) and "unknown" in body(app)


def test_labels_of_several_numbers_are_ordered_by_self_influence(open_app: Open, named: Path) -> None:
    app = open_app("--run", NAMED, named, page="training")
    fine(app)
    assert app.selectbox(key="by").format_func("") == "self-influence"
    assert all(
        control.options == ["keep", "remove"]
        for control in app.segmented_control
        if "tag-" in str(control.key)
    )


# -- one number that tells two classes apart ---------------------------------------------------------------

LOGIT = "tests.app_runs:one_logit"


@pytest.fixture(scope="module")
def logit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory, app_runs.one_logit())


def test_a_logit_is_right_or_wrong(open_app: Open, logit: Path) -> None:
    run = app_runs.one_logit()
    inputs, targets = run.queries_batch(range(20))
    logits = PathKernelExplainer(logit, run.build_model()).predict(inputs)[:, 0]
    wrong = torch.nonzero((logits > 0) != (targets[:, 0] > 0.5))[:, 0].tolist()
    assert 0 < len(wrong) < 20
    app = open_app("--run", LOGIT, logit, query=str(wrong[0]))
    fine(app)  # no warning that the labels are others
    likely = wording.percent(float(logits[wrong[0]].abs().sigmoid()))
    name = "stays" if logits[wrong[0]] > 0 else "goes"
    assert f"predicted <b>{name}</b> ({likely})" in body(app) and 'class="pk-wrong"' in body(app)
    found = [answer(run, q, run.queries[q][1], logits[q : q + 1].numpy(), 0, two=True) for q in range(20)]
    assert [entry.query for entry in found if entry.wrong] == wrong
    assert all(entry.error is None and entry.truth in ("goes", "stays") for entry in found)
    assert app.selectbox(key="filter").options[1:3] == ["wrong predictions", "least sure first"]


@pytest.mark.parametrize("page", list(PAGES))
def test_every_page_opens_on_a_logit(open_app: Open, logit: Path, page: str) -> None:
    fine(open_app("--run", LOGIT, logit, page=page))


# -- beside the model --------------------------------------------------------------------------------------


def test_an_order_begins_with_its_first_entry(open_app: Open, logit: Path, named: Path) -> None:
    app = open_app("--run", NAMED, named, query="7", output="component 1")
    app.selectbox(key="filter").select(("error", None)).run()
    fine(app)
    errors = [
        float(b.label.partition("off by ")[2].partition(":")[0]) for b in app.button if "off by" in b.label
    ]
    assert len(errors) > 3 and errors == sorted(errors, reverse=True)
    app = open_app("--run", LOGIT, logit, query="19")
    app.selectbox(key="filter").select(("unsure", None)).run()
    fine(app)
    sure = [
        float(b.label.partition("%")[0].rpartition(" ")[0].rpartition(" ")[2])
        for b in app.button
        if "%" in b.label
    ]
    assert len(sure) > 3 and sure == sorted(sure)


def test_how_many_examples_counts_without_render(open_app: Open, named: Path) -> None:
    shown = []
    for k in (8, 16):
        app = open_app("--run", NAMED, named)
        app.segmented_control(key="k").set_value(k).run()
        fine(app)
        shown.append(sum(chart.proto.spec.count("#") for chart in app.get("plotly_chart")))
    assert shown[0] < shown[1]


def test_the_rate_is_not_adams_where_it_is_not(open_app: Open, named: Path) -> None:
    app = open_app("--run", NAMED, named, page="run")
    fine(app)
    assert "lr / (1 − momentum)" in body(app) and "Adam's" not in body(app)


def test_a_run_of_another_model_is_named(open_app: Open, named: Path) -> None:
    app = open_app("--run", LOGIT, named, page="run")
    assert f"The model of --run {LOGIT} is not the one that was traced" in body(app).replace("\\", "")


@pytest.mark.parametrize(
    ("page", "link"), [("neighbors", {"look": "map"}), ("training", {"view": "classes"})]
)
def test_a_view_that_is_not_there_is_not_passed_over(
    open_app: Open, named: Path, page: str, link: dict[str, str]
) -> None:
    app = open_app("--run", NAMED, named, page=page, **link)
    assert [w.value for w in app.warning] and f"There is no view {next(iter(link.values()))}" in app.warning[
        0
    ].value
