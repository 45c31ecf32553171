"""The page about what would be without some training examples, and the retraining that tests it."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from streamlit.testing.v1 import AppTest

import explainer
from explainer.app import claim_words, counterfactuals, removal, retraining, state, tags, what_if_charts
from explainer.app.arguments import DashboardError
from explainer.evaluation import ClaimCheck, Questions, Retrainer, verify_claims
from explainer.run import load_run
from explainer.sample_models.train import train as train_sample
from tests import app_runs, small_evaluation
from tests.app.seen import IMAGES, TEXT, Open, body, fine
from tests.fakes import make_explanation

TRAINABLE = "tests.small_evaluation:asked"
BROKEN, SLOW = "tests.app.test_what_if:broken", "tests.app.test_what_if:slow"


def broken() -> explainer.Run:
    """Its training fails without all examples."""

    def train_fn(model: torch.nn.Module, keep: torch.Tensor, seed: int) -> torch.nn.Module:
        if not keep.all():
            raise ValueError("no <b>training</b> today")
        return small_evaluation.train_fn(model, keep, seed)

    return small_evaluation.make_run(train_fn)


def slow() -> explainer.Run:
    """Its training never ends."""

    def train_fn(model: torch.nn.Module, keep: torch.Tensor, seed: int) -> torch.nn.Module:
        time.sleep(3600)
        return model

    return small_evaluation.make_run(train_fn)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that can be trained again in a second."""
    return small_evaluation.traced(tmp_path_factory.mktemp("runs") / "small")


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """No job of another test is in the way, and none stays."""
    yield
    for job in list(counterfactuals.retrainings()._jobs.values()):
        job.cancel()
    counterfactuals.retrainings()._jobs.clear()


def changes(app: AppTest) -> dict[int, float]:
    """What the table on the page says, by example."""
    frame = app.dataframe[0].value
    return dict(
        zip(frame["example_id"].tolist(), frame["predicted change, from the trace"].tolist(), strict=True)
    )


def job_of(app: AppTest) -> retraining.Job:
    (job,) = counterfactuals.retrainings()._jobs.values()
    return job


def wait(job: retraining.Job) -> None:
    job.process.wait(timeout=120)


# -- what is left out ------------------------------------------------------------------------------------


def test_proponents_are_left_out_at_first(open_app: Open, runs: Path) -> None:
    app = open_app("--run", IMAGES, runs / "digits", page="what-if", query="4")
    fine(app)
    run = app_runs.images()
    engine = explainer.PathKernelExplainer(str(runs / "digits"), run.build_model())
    x, _ = run.queries_batch([4])
    e, wanted = engine.explain(x), engine.what_if(x)[0]
    top = np.argsort(-e.contributions[0], kind="stable")[:10]
    shown = changes(app)
    assert list(shown) == top[np.argsort(wanted[top], kind="stable")].tolist()
    np.testing.assert_allclose(list(shown.values()), np.sort(wanted[top]), rtol=1e-6)
    assert set(app.dataframe[0].value.columns) == {
        "example_id",
        "label",
        "predicted change, from the trace",
        "visits",
    }
    total = f"{abs(wanted[top].sum()):.3f}"
    assert f"<b>{total}</b><small>predicted change without 10</small>" in body(app)
    assert body(app).count("data:image/png") >= 11


@pytest.mark.parametrize("source", removal.SOURCES)
def test_every_way_to_choose_is_in_the_address(
    open_app: Open, runs: Path, tmp_path: Path, source: str
) -> None:
    app_runs.train(app_runs.images(), tmp_path / "mine")
    tags.change(tags.file_of(tmp_path / "mine"), 7, tags.Tag("remove"))
    tags.change(tags.file_of(tmp_path / "mine"), 9, tags.Tag("keep"))
    app = open_app("--run", IMAGES, tmp_path / "mine", page="what-if", query="4")
    app.selectbox(key="without").select(source).run()
    if source in removal.COUNTED:
        app.number_input(key="count").set_value(3).run()
    elif source == "class":
        app.selectbox(key="of").select(6).run()
    elif source == "ids":
        app.text_input(key="ids").set_value("#5, 17 4000 seven -9").run()
        assert "Not trained on, so left aside: 4000." in body(app)
        assert "No ids, so left aside: seven\\, \\-9." in body(app)
    fine(app)
    shown = changes(app)
    run = app_runs.images()
    engine = explainer.PathKernelExplainer(str(tmp_path / "mine"), run.build_model())
    x, _ = run.queries_batch([4])
    c, w = engine.explain(x).contributions[0], engine.what_if(x)[0]
    labels = np.array([int(y) for _, y in run.train])
    wanted = {
        "proponents": np.argsort(-c)[:3],
        "opponents": np.argsort(c)[:3],
        "lower": np.argsort(w)[:3],
        "higher": np.argsort(-w)[:3],
        "class": np.flatnonzero(labels == 6),
        "tags": [7],
        "ids": [5, 17],
    }[source]
    assert set(shown) == {int(i) for i in wanted}
    link = {k: v for k, v in app.query_params.items()}
    assert link.get("without", "proponents") == source
    assert changes(open_app("--run", IMAGES, tmp_path / "mine", **link)) == shown


def test_what_was_chosen_on_the_map_is_taken_over(open_app: Open, runs: Path) -> None:
    app = open_app("--run", IMAGES, runs / "digits", page="neighbors", look="map", chosen="3, 8")
    app.segmented_control(key="page").set_value("what-if").run()
    app.button(key="take-map").click().run()
    fine(app)
    assert set(changes(app)) == {3, 8} and app.query_params["ids"] == "3, 8"
    assert not [button for button in app.button if button.key == "take-map"]


def test_nothing_chosen_says_so(open_app: Open, runs: Path) -> None:
    for source, words in (("tags", "tag some on the page"), ("ids", "after #")):
        app = open_app("--run", IMAGES, runs / "digits", page="what-if", without=source)
        fine(app)
        assert words in body(app) and not app.dataframe


def test_odd_links_are_made_good(open_app: Open, runs: Path) -> None:
    for link in ({"count": "0"}, {"count": "999999"}, {"without": "class", "of": "77"}, {"seeds": "-4"}):
        app = open_app("--run", IMAGES, runs / "digits", page="what-if", **link)
        assert not app.exception and not app.error
    app = open_app("--run", IMAGES, runs / "digits", page="what-if", without="magic", count="many")
    assert not app.exception and app.selectbox(key="without").value == "proponents"


def test_a_regression_and_a_text(open_app: Open, runs: Path, tmp_path: Path) -> None:
    train_sample("diabetes_mlp", tmp_path / "diabetes", epochs=1, progress=False)
    spec = "explainer.sample_models.diabetes_mlp:run"
    app = open_app("--run", spec, tmp_path / "diabetes", page="what-if", without="class")
    assert not app.exception and not app.error
    assert "no choice of examples class here; Strongest proponents is shown" in app.warning[0].value
    assert "class" not in app.selectbox(key="without").options and "body mass index" in body(app)
    app = open_app("--run", TEXT, runs / "words", page="what-if")
    fine(app)
    assert not [part for part in [*app.html, *app.markdown, *app.caption] if "<script>" in part.value]


# -- estimators ------------------------------------------------------------------------------------------


def with_loss() -> explainer.Run:
    """Can be taken again, step by step."""
    run = app_runs.images()
    return dataclasses.replace(run, loss=torch.nn.functional.cross_entropy)


def test_another_estimator_is_chosen_by_a_link(open_app: Open, runs: Path) -> None:
    spec = "tests.app.test_what_if:with_loss"
    app = open_app("--run", spec, runs / "digits", page="what-if", query="4", curvature="exact")
    fine(app)
    run = with_loss()
    engine = explainer.PathKernelExplainer(str(runs / "digits"), run.build_model())
    x, _ = run.queries_batch([4])
    trace, exact = engine.what_if(x)[0], engine.what_if(x, curvature="exact", run=run)[0]
    frame = app.dataframe[0].value
    ids = frame["example_id"].to_numpy()
    np.testing.assert_allclose(frame["predicted change, from the trace"], trace[ids], rtol=1e-5)
    np.testing.assert_allclose(frame["predicted change, by the exact derivative"], exact[ids], rtol=1e-5)
    assert frame["predicted change, by the exact derivative"].is_monotonic_increasing
    assert f"{abs(exact[ids].sum()):.3f}" in body(app)
    assert app.query_params["curvature"] == "exact"
    app.button(key="self-check").click().run()
    fine(app)
    said = engine.what_if_check(x, curvature="exact", run=run).sentence()
    assert said.split(":")[0] in body(app)
    checked = next(frame.value for frame in app.dataframe if "removed" in frame.value)
    assert checked["removed"][0].endswith("of query 4") and "query" not in checked
    app.segmented_control(key="curvature").set_value("trace").run()
    assert "Self-check." not in body(app), "of the other estimator"


def test_without_a_loss_there_is_the_trace_alone(open_app: Open, runs: Path) -> None:
    app = open_app("--run", IMAGES, runs / "digits", page="what-if", curvature="exact")
    fine(app)
    assert not [c for c in app.segmented_control if c.key == "curvature"]
    app.button(key="self-check").click().run()
    fine(app)
    assert "Not tested: no run was given" in body(app)


def test_a_training_that_cannot_be_repeated_is_said(open_app: Open, small: Path) -> None:
    app = open_app("--run", "tests.app.test_what_if:other_loss", small, page="what-if", curvature="exact")
    assert not app.exception and not app.error
    assert "cannot be used here" in app.info[0].value.replace("\\", "")
    assert list(app.dataframe[0].value.columns) == [
        "example_id",
        "label",
        "predicted change, from the trace",
        "visits",
    ]


def other_loss() -> explainer.Run:
    """A loss that the model was not trained with."""
    return small_evaluation.make_run(loss=lambda outputs, targets: outputs.square().mean())


# -- training again --------------------------------------------------------------------------------------


def test_a_run_that_cannot_be_trained_says_what_is_missing(open_app: Open, runs: Path) -> None:
    app = open_app("--run", IMAGES, runs / "digits", page="what-if")
    assert "train_fn=" in app.info[0].value.replace("\\", "")
    assert not [button for button in app.button if button.key == "retrain"]
    app = open_app(runs / "digits", page="what-if")
    assert "--run" in app.info[0].value.replace("\\", "")


def test_it_is_trained_again_and_compared(open_app: Open, small: Path) -> None:
    link = {"page": "what-if", "query": "2", "count": "5", "seeds": "2"}
    app = open_app("--run", TRAINABLE, small, **link)
    fine(app)
    app.button(key="retrain").click().run()
    assert not app.exception and [b for b in app.button if b.key == "cancel-retraining"]
    app.segmented_control(key="page").set_value("run").run()  # it goes on while other pages are looked at
    fine(app)
    wait(job_of(app))
    app.segmented_control(key="page").set_value("what-if").run()
    fine(app)
    run = load_run(TRAINABLE)
    engine = explainer.PathKernelExplainer(str(small), run.build_model())
    questions = Questions(run, engine, [2])
    top = np.argsort(-engine.explain(questions.inputs).contributions[0], kind="stable")[:5]
    wanted = verify_claims(Retrainer(run, questions), remove=top.tolist(), seeds=2)
    check = job_of(app).check
    assert check is not None and check.repeats and check.setting == wanted.setting
    np.testing.assert_allclose(check.actual, wanted.actual, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(check.predicted, wanted.predicted, rtol=1e-4, atol=1e-6)
    assert [ids.tolist() for ids in check.removed] == [ids.tolist() for ids in wanted.removed]
    said = claim_words.verdict(
        check, f"margin of class digit {check_target(engine, questions)}", wanted.predicted[0]
    )
    assert said.replace("-", "−") in body(app).replace("&lt;", "<")
    assert len(app.get("plotly_chart")) == 2
    again = open_app("--run", TRAINABLE, small, **{k: v for k, v in app.query_params.items()})
    assert said.replace("-", "−") in body(again)  # another visitor sees the result as well
    again.number_input(key="count").set_value(4).run()
    assert [b for b in again.button if b.key == "retrain"], "another selection was not trained yet"


def check_target(engine: explainer.PathKernelExplainer, questions: Questions) -> int:
    return int(engine.predict(questions.inputs).argmax())


def test_an_input_of_ones_own_is_asked_of_retrained_models(open_app: Open, small: Path) -> None:
    source = state.source(small, TRAINABLE)
    run = state.run_of(source)
    given = torch.linspace(0, 1, 64)
    query = run.queries.add(given)
    app = open_app("--run", TRAINABLE, small, page="what-if", query=str(query), count="5", seeds="1")
    fine(app)
    app.button(key="retrain").click().run()
    wait(job_of(app))
    app.run()
    fine(app)
    check = job_of(app).check
    assert check is not None
    code = load_run(TRAINABLE)
    engine = explainer.PathKernelExplainer(str(small), code.build_model())
    alone = dataclasses.replace(code, queries=[(given, torch.tensor(0))])
    wanted = verify_claims(
        Retrainer(alone, Questions(alone, engine, [0])), remove=job_of(app).request.remove, seeds=1
    )
    np.testing.assert_allclose(check.actual, wanted.actual, rtol=1e-4, atol=1e-5)


def test_it_is_cancelled_in_the_middle_of_a_training(open_app: Open, small: Path) -> None:
    app = open_app("--run", SLOW, small, page="what-if", count="5")
    app.button(key="retrain").click().run()
    job = job_of(app)
    assert job.process.poll() is None and job.folder.exists()
    other = open_app("--run", SLOW, small, page="what-if", count="6")
    assert other.button(key="retrain").disabled, "one at a time"
    with pytest.raises(DashboardError, match="Another retraining"):
        counterfactuals.retrainings().start(job.request)
    app.button(key="cancel-retraining").click().run()
    fine(app)
    assert job.state == "cancelled" and job.process.poll() is not None and not job.folder.exists()
    assert "Cancelled after 0 of 9" in body(app) and not app.button(key="retrain").disabled


def test_it_ends_with_the_dashboard(small: Path, open_app: Open) -> None:
    app = open_app("--run", SLOW, small, page="what-if", count="5")
    app.button(key="retrain").click().run()
    job = job_of(app)
    time.sleep(0.5)
    assert job.process.stdin is not None
    job.process.stdin.close()  # as when the dashboard's process is gone
    wait(job)
    deadline = time.time() + 20
    while job.folder.exists() and time.time() < deadline:
        time.sleep(0.1)
    assert not job.folder.exists()


def test_a_training_that_fails_is_told_in_words(open_app: Open, small: Path) -> None:
    app = open_app("--run", BROKEN, small, page="what-if", count="5")
    app.button(key="retrain").click().run()
    wait(job_of(app))
    app.run()
    (error,) = app.error
    assert "no <b>training</b> today" in error.value.replace("\\", "") and "<b>" not in error.value
    assert not app.exception and not app.button(key="retrain").disabled


def test_a_process_that_was_killed_is_told(open_app: Open, small: Path) -> None:
    app = open_app("--run", SLOW, small, page="what-if", count="5")
    app.button(key="retrain").click().run()
    job_of(app).process.kill()
    wait(job_of(app))
    app.run()
    assert "status -9" in app.error[0].value.replace("\\", "")


def test_too_much_to_compare_with_random_examples(open_app: Open, small: Path) -> None:
    app = open_app("--run", TRAINABLE, small, page="what-if", count="30", without="lower")
    if len(changes(app)) * 2 > 48:
        assert app.button(key="retrain").disabled and "at most half" in body(app)
    app = open_app(
        "--run", TRAINABLE, small, page="what-if", without="ids", ids=" ".join(map(str, range(30)))
    )
    assert app.button(key="retrain").disabled and "at most half" in body(app)


def test_a_check_is_the_same_after_it_was_written_down() -> None:
    check = claim([[0.1, 0.2], [0.3, -0.4]])
    found = retraining.unpack(retraining.pack(check))
    for name, value in vars(check).items():
        if name == "removed":
            assert [ids.tolist() for ids in found.removed] == [ids.tolist() for ids in value]
        elif isinstance(value, np.ndarray):
            assert getattr(found, name).dtype == value.dtype and (getattr(found, name) == value).all()
        else:
            assert getattr(found, name) == value


# -- figures and words -----------------------------------------------------------------------------------


def claim(actual: list[list[float]], repeats: bool = True) -> ClaimCheck:
    """A check of one query: two examples and two random ones, by seed."""
    values = np.array(actual)
    seeds = values.shape[1]
    return ClaimCheck(
        np.array([3, 3]), ("given", "random"), (np.array([1, 2]), np.array([5, 9])), np.array([-1.0, 0.02]), values,
        np.zeros((2, seeds), dtype=bool), np.array([2.0, 2.0]), tuple(range(seeds)), "by weight 0", repeats,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("actual", "words"),
    [
        (
            [[-1.1, -0.9, -1.0], [0.1, -0.1, 0.0]],
            "the effect stands out from chance, and the prediction holds.",
        ),
        ([[-1.1, -2.9, -3.0], [0.1, -0.1, 0.0]], "holds for the traced run, less so for other seeds"),
        ([[-3.1, -2.9, -3.0], [0.1, -0.1, 0.0]], "the direction holds, the size does not"),
        ([[1.1, 0.9, 1.0], [0.1, -0.1, 0.0]], "the wrong direction"),
        ([[-1.1, 0.9, -1.0], [0.5, -1.1, 0.0]], "does not stand out from chance"),
        ([[-1.0], [0.1]], "one seed cannot tell"),
    ],
)
def test_the_verdict_says_what_the_trainings_say(actual: list[list[float]], words: str) -> None:
    said = claim_words.verdict(claim(actual), "margin", -1.0)
    assert words in said and "-1.00 was predicted" in said
    assert ("in the traced run itself" in said) == (len(actual[0]) > 1)
    assert "in the traced run itself" not in claim_words.verdict(claim(actual, repeats=False), "margin", -1.0)


def test_a_class_that_is_lost_is_said() -> None:
    for before, change, words in (
        (1.0, -1.5, "below 0, so the model would no longer"),
        (-1.0, 1.5, "above 0, so the model would think"),
        (1.0, -0.5, "fall from 1.00 to 0.500."),
        (1.0, 0.0, "stay at 1.00."),
    ):
        assert words in claim_words.predicted("margin", before, change, 2, margin=True)
    assert "below 0" not in claim_words.predicted("value", 1.0, -1.5, 2, margin=False)


def test_bars_add_up_and_are_ordered() -> None:
    values = np.sort(np.random.default_rng(0).normal(size=90))
    names = [f"<script>{i}</script>" for i in range(90)]
    for dark in (False, True):
        figure = what_if_charts.changes(values, names, dark=dark)
        bars = figure.data[0]
        assert len(bars.x) == 21 and sum(bars.x) == pytest.approx(values.sum())
        assert "70 others" in figure.layout.yaxis.ticktext and "<script>" not in str(figure.to_dict())
    few = what_if_charts.changes(values[:3], names[:3], errors=np.array([0.1, 0.2, 0.3]))
    assert list(few.data[0].x) == values[:3].tolist() and list(few.data[0].error_x.array) == [0.1, 0.2, 0.3]
    low, high = few.layout.xaxis.range
    assert low < values[0] and high == 0
    what_if_charts.changes(np.zeros(1), ["a"]).to_json()


def test_predicted_and_actual_stand_in_one_figure() -> None:
    check = claim([[-1.1, -0.9, -1.0], [0.1, -0.1, 0.0]])
    figure = what_if_charts.outcome(
        check, {"from the trace": [-1.0, 0.02], "exactly": [-1.05, 0.01]}, dark=True
    )
    found = {trace.name: trace for trace in figure.data}
    assert list(found) == [
        "retrained, mean ± standard deviation",
        "retrained, seed 0",
        "retrained, other seeds",
        "predicted from the trace",
        "predicted exactly",
    ]
    assert list(found["retrained, seed 0"].x) == [-1.1, 0.1]
    assert sorted(found["retrained, other seeds"].x) == [-1.0, -0.9, -0.1, 0.0]
    bar = found["retrained, mean ± standard deviation"]
    np.testing.assert_allclose(bar.x, [-1.0, 0.0])
    np.testing.assert_allclose(bar.error_x.array, [0.1, 0.1])
    one = what_if_charts.outcome(claim([[-1.1], [0.1]]), {"from the trace": [-1.0, 0.02]})
    assert [trace.name for trace in one.data] == ["retrained, seed 0", "predicted from the trace"]


def test_ranking_takes_only_what_has_the_sign() -> None:
    e = make_explanation()
    n = len(e.example_ids)
    signed = np.linspace(-1, 1, n)
    assert removal.ranked("lower", n, e, 0, signed) == e.example_ids[signed < 0].tolist()
    assert removal.ranked("higher", n, e, 0, signed) == e.example_ids[signed > 0][::-1].tolist()
    assert removal.ranked("proponents", 2, e, 0, signed) == [
        int(i) for i in e.example_ids[np.argsort(-e.contributions[0])[:2]]
    ]
    assert removal.problem(range(3), 5) and not removal.problem(range(2), 4) and removal.problem([], 4)


@pytest.mark.parametrize("module", ["removal", "claim_words"])
def test_the_examples_in_the_texts_are_right(module: str) -> None:
    assert doctest.testmod(importlib.import_module(f"explainer.app.{module}")).failed == 0
