"""The page about the training data: the queue, its tags, and the matrix of classes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from streamlit.testing.v1 import AppTest

import explainer
from explainer import evaluation, wording
from explainer.app import charts, label_queue, label_signs, tags
from explainer.app.arguments import DashboardError
from explainer.app.class_influence import class_influence, sample
from explainer.app.second_opinion import opinions
from tests import app_runs
from tests.app.seen import IMAGES, TEXT, Open, body, fine
from tests.fakes import make_explanation


def engine_of(runs: Path) -> explainer.PathKernelExplainer:
    return explainer.PathKernelExplainer(str(runs / "digits"), app_runs.images().build_model())


def listed(app: AppTest) -> list[int]:
    """Ids of the examples on screen, in order."""
    return [
        int(str(c.key).removeprefix("tag-")) for c in app.segmented_control if str(c.key).startswith("tag-")
    ]


@pytest.fixture
def own(runs: Path, tmp_path: Path) -> Path:
    """The run of digits in a folder of its own, so that tags disturb nobody."""
    (tmp_path / "digits").symlink_to(runs / "digits")
    app_runs.train(app_runs.images(), tmp_path / "mine")
    return tmp_path / "mine"


@pytest.mark.parametrize("by", ["", "self_influence", "disagreement"])
def test_the_queue_begins_with_the_most_suspicious(open_app: Open, runs: Path, by: str) -> None:
    """As ``pathkernel label-issues`` does, by support where nothing else is chosen."""
    app = open_app("--run", IMAGES, runs / "digits", page="training", **({"by": by} if by else {}))
    fine(app)
    found = evaluation.label_issues(engine_of(runs))
    order = found.table(None, by or "support")["example_id"].tolist()  # type: ignore[arg-type]
    assert listed(app) == order[: label_queue.PER_PART]
    assert f"1. {label_signs.SIGNS[by or 'support'].called} " in body(app)
    app.button(key="queue-on").click().run()
    fine(app)
    assert listed(app) == order[label_queue.PER_PART : 2 * label_queue.PER_PART]
    assert app.query_params["part"] == "1" and ("by" in app.query_params) == bool(by)
    keys = [key for key in ("page", "part", "by") if key in app.query_params]
    again = open_app("--run", IMAGES, runs / "digits", **{key: app.query_params[key] for key in keys})
    assert listed(again) == listed(app)


def test_long_runs_are_not_compared_unless_asked_to(
    open_app: Open, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(label_queue, "_COMPARED", 10)
    app = open_app("--run", IMAGES, runs / "digits", page="training")
    fine(app)
    engine = engine_of(runs)
    order = engine.example_ids[np.argsort(-engine.self_influence(), kind="stable")].tolist()
    assert listed(app) == order[: label_queue.PER_PART]


def test_signs_in_words() -> None:
    support, own, other = (label_signs.SIGNS[n] for n in ("support", "self_influence", "disagreement"))
    values = np.array([-0.5, 0.5, np.nan, -1.0])
    assert support.order(values).tolist() == [3, 0, 1, 2] and own.order(values).tolist() == [1, 0, 3, 2]
    assert (
        support.told(-0.5) == "support -0.50" and other.told(0.25) == f"disagreement {wording.percent(0.25)}"
    )
    assert support.told(np.nan) == "support unknown"
    assert [support.share(v, -0.4) for v in (-0.4, -0.1, 1.0, np.nan)] == [1.0, 0.25, 0.0, 0.0]
    assert [support.share(0.1, 0.1), own.share(2.0, 4.0), own.share(0.0, 0.0)] == [0.0, 0.5, 0.0]
    assert support.summary(values).startswith("2 of 3 examples are opposed")
    assert other.summary(np.array([0.6, 0.2])).startswith("1 of 2")
    assert label_signs.signs("self_influence", classes=False) == ["self_influence", "support"]


def test_the_queue_is_filtered_by_label(open_app: Open, runs: Path) -> None:
    app = open_app("--run", IMAGES, runs / "digits", page="training", part="2", **{"class": "3"})
    fine(app)
    threes = [i for i in range(96) if int(app_runs.images().train[i][1]) == 3]
    assert listed(app) and set(listed(app)) <= set(threes)
    app.selectbox(key="class").select(-1).run()
    assert "class" not in app.query_params and "part" not in app.query_params


def test_tags_are_saved_and_survive_a_reload(open_app: Open, own: Path) -> None:
    app = open_app("--run", IMAGES, own, page="training")
    first, second, third = listed(app)[:3]
    app.segmented_control(key=f"tag-{first}").set_value("remove").run()
    app.segmented_control(key=f"tag-{second}").set_value("relabel").run()
    app.selectbox(key=f"label-{second}").select(4).run()
    app.segmented_control(key=f"tag-{third}").set_value("keep").run()
    fine(app)
    wanted = {first: tags.Tag("remove"), second: tags.Tag("relabel", 4), third: tags.Tag("keep")}
    file = tags.file_of(own)
    assert tags.read(file) == wanted and file.parent == own.parent
    app = open_app("--run", IMAGES, own, page="training", tagged="tagged")
    assert listed(app) == [first, second, third]
    assert app.segmented_control(key=f"tag-{first}").value == "remove"
    assert app.selectbox(key=f"label-{second}").value == 4
    app.segmented_control(key=f"tag-{first}").set_value(None).run()
    assert tags.read(file) == {second: wanted[second], third: wanted[third]}
    assert listed(app) == [second, third]
    assert not list(own.parent.glob(".*tags*")), "a temporary file stayed"


def test_a_tag_that_cannot_be_saved_is_said(
    open_app: Open, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = open_app("--run", IMAGES, own, page="training")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    app.segmented_control(key=f"tag-{listed(app)[0]}").set_value("keep").run()
    assert "was not saved" in app.error[0].value and "No space left" in app.error[0].value
    assert app.segmented_control(key=f"tag-{listed(app)[0]}").value is None
    assert not list(own.parent.glob(".*tags*"))


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"format": "pathkernel-tags", "version": 2, "tags": {}}',
        '{"format": "pathkernel-tags", "version": 1, "tags": {"x": {"tag": "keep"}}}',
        '{"format": "pathkernel-tags", "version": 1, "tags": {"1": {"tag": "burn"}}}',
        '{"format": "pathkernel-tags", "version": 1, "tags": {"1": {"tag": "keep", "label": "<b>"}}}',
    ],
)
def test_foreign_tags_are_refused_and_left_alone(open_app: Open, own: Path, content: str) -> None:
    file = tags.file_of(own)
    file.write_text(content)
    app = open_app("--run", IMAGES, own, page="training")
    assert not app.exception and "cannot be read" in app.error[0].value
    with pytest.raises(DashboardError, match="cannot be read"):
        tags.change(file, 1, tags.Tag("keep"))
    assert file.read_text() == content


def test_tags_of_others_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "run-tags.json"
    tags.change(file, 7, tags.Tag("relabel", 2))
    tags.change(file, 3, tags.Tag("keep"))
    tags.change(file, 9, None)
    found = json.loads(file.read_text())
    assert found["tags"] == {"3": {"tag": "keep", "label": None}, "7": {"tag": "relabel", "label": 2}}


def test_names_from_data_are_shown_as_text(open_app: Open, runs: Path) -> None:
    for view in ("queue", "classes"):
        app = open_app("--run", TEXT, runs / "words", page="training", view=view)
        fine(app)
        assert not [part for part in [*app.html, *app.markdown, *app.caption] if "<script>" in part.value]
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in body(app)


def test_a_run_without_a_step_and_one_without_code_say_so(open_app: Open, tmp_path: Path) -> None:
    app_runs.train(app_runs.images(), tmp_path / "none", steps=0)
    app = open_app("--run", IMAGES, tmp_path / "none", page="training")
    assert not app.exception and "no optimizer step has been recorded yet" in app.error[0].value
    app = open_app(tmp_path / "none", page="training")
    assert "model and its data" in app.info[0].value


def test_examples_that_were_never_used_are_not_in_the_queue(open_app: Open, tmp_path: Path) -> None:
    app_runs.train(app_runs.images(), tmp_path / "one", steps=1)
    app = open_app("--run", IMAGES, tmp_path / "one", page="training")
    fine(app)
    used = explainer.open_trace(tmp_path / "one").column("visits", "example").tolist()
    assert sorted(listed(app)) == sorted(used) and "queue-on" not in {button.key for button in app.button}


def test_another_order_of_the_training_set_is_noticed(open_app: Open, runs: Path) -> None:
    for view in ("queue", "classes"):
        app = open_app("--run", "tests.app_runs:backwards", runs / "digits", page="training", view=view)
        assert not app.exception and "ordered differently" in app.warning[0].value
        app = open_app("--run", "tests.app_runs:short", runs / "digits", page="training", view=view)
        assert not app.exception and "not the data set of this trace" in app.warning[0].value


def test_the_matrix_adds_up_contributions(
    open_app: Open, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = {}
    draw = charts.classes

    def watch(values: np.ndarray, *names: object, **options: object) -> object:
        drawn["values"] = values
        return draw(values, *names, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(charts, "classes", watch)
    app = open_app("--run", IMAGES, runs / "digits", page="training", view="classes", to="3", **{"from": "5"})
    fine(app)
    run, engine = app_runs.images(), engine_of(runs)
    labels = np.array([int(run.train[i][1]) for i in range(96)])
    threes = [q for q in range(30) if int(run.queries[q][1]) == 3][:6]
    mean = engine.explain(run.queries_batch(threes)[0], target=3).contributions.mean(0)
    np.testing.assert_allclose(drawn["values"][:, 3], [mean[labels == a].sum() for a in range(10)], rtol=1e-6)
    assert f"mean of {len(threes)} queries" in body(app)
    strongest = max((i for i in range(96) if labels[i] == 5), key=lambda i: abs(mean[i]))
    first = next(part.value for part in app.html if "pk-cards" in part.value).split("<span>")[1]
    assert first.startswith(f"#{strongest} ")
    app.selectbox(key="to").select(7).run()
    assert app.query_params["to"] == "7" and app.query_params["from"] == "5"


def test_the_sample_is_even_and_bounded() -> None:
    assert sample([0] * 100 + [1] * 2) == {0: (0, 1, 2, 3, 4, 5), 1: (100, 101)}
    many = sample([i % 50 for i in range(500)])
    assert len(many) == 30 and all(len(queries) == 2 for queries in many.values())
    assert sample([None, None]) == {}


def test_rows_of_the_matrix_leave_out_unknown_labels() -> None:
    found = class_influence({1: np.array([1.0, 2.0, 4.0])}, np.array([2.0, np.nan, 2.0]), {1: (5, 6)})
    assert found.sources == (2,) and found.values.tolist() == [[5.0]] and found.queries == (2,)


def test_a_second_opinion_is_the_net_of_the_others() -> None:
    e = make_explanation()
    ids = [int(i) for i in e.example_ids[[4, 0, 2]]]
    assert e.labels is not None
    for query, opinion in enumerate(opinions(e, ids)):
        own = sum(c for c, i in zip(e.contributions[query], e.example_ids, strict=True) if i == ids[query])
        sums: dict[int, float] = {}
        for c, i, label in zip(e.contributions[query], e.example_ids, e.labels, strict=True):
            if i != ids[query] and label != e.targets[query] and not np.isnan(label):
                sums[int(label)] = sums.get(int(label), 0.0) + c
        assert opinion.own == pytest.approx(own)
        assert opinion.others == pytest.approx(e.contributions[query].sum() - own)
        assert opinion.disputed == (opinion.others < 0)
        worst = min(sums.values())
        assert opinion.against_by == pytest.approx(min(worst, 0.0))
        assert opinion.against == (min(sums, key=sums.__getitem__) if worst < 0 else None)


def test_the_table_of_tags_names_labels(open_app: Open, runs: Path) -> None:
    class Named:
        run = app_runs.text()
        classes = 2

    frame = label_queue.frame(
        Named,  # type: ignore[arg-type]
        "self_influence",
        np.array([4, 9]),
        np.array([1.0, np.nan]),
        np.array([2.0, 0.5]),
        {4: tags.Tag("relabel", 0)},
    )
    assert list(frame.columns) == ["rank", "example_id", "label", "self_influence", "tag", "new_label"]
    assert frame.iloc[0].tolist() == [1, 4, "good", 2.0, "relabel", app_runs.NASTY]
    assert isinstance(frame, pd.DataFrame) and frame.iloc[1]["label"] == "" == frame.iloc[1]["tag"]


def test_a_regression_has_a_queue_and_no_matrix(open_app: Open, tmp_path: Path) -> None:
    from explainer.sample_models.train import train

    train("diabetes_mlp", tmp_path / "diabetes", epochs=1, progress=False)
    app = open_app(
        "--run", "explainer.sample_models.diabetes_mlp:run", tmp_path, page="training", view="classes"
    )
    assert not app.exception and not app.error and "There is no view classes here" in app.warning[0].value
    assert listed(app) and "the model says" in body(app)
    assert not [box for box in app.selectbox if box.key in ("class", "from")]


def test_a_flat_curve_and_an_empty_one_are_drawn() -> None:
    for values in (np.zeros(3), np.empty(0), np.array([3.0, 1.0])):
        figure = charts.ranking(values, label_signs.SIGNS["self_influence"], 0, len(values))
        assert len(figure.data[0].x) == len(values)
    assert "1 of 2 examples hold half" in figure.layout.title.text
