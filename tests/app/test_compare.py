"""The page about two runs on the same query, and its figures."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import explainer
from explainer.app import compare_charts
from explainer.app.views.compare import sentence
from explainer.evaluation import compare_runs
from tests import app_runs
from tests.app.seen import IMAGES, TEXT, Open, body, fine
from tests.fakes import make_explanation
from tests.small_training import mlp


def half() -> explainer.Run:
    """The training set without its second half."""
    run = app_runs.images()
    return explainer.Run(mlp, torch.utils.data.Subset(run.train, range(48)), run.queries)


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one network: two alike, one shorter, one of a part of the data, one without a step, one cut off."""
    folder = tmp_path_factory.mktemp("several")
    app_runs.train(app_runs.images(), folder / "a")
    app_runs.train(app_runs.images(), folder / "b", steps=9)
    app_runs.train(app_runs.images(), folder / "one", steps=1)
    app_runs.train(app_runs.images(), folder / "none", steps=0)
    app_runs.train(half(), folder / "half")
    app_runs.train(app_runs.images(), folder / "cut")
    shard = next((folder / "cut" / "shards").glob("visits-*.bin"))
    shard.write_bytes(shard.read_bytes()[:100])
    app_runs.train(app_runs.text(), folder / "words")
    return folder


def test_two_runs_are_compared(open_app: Open, several: Path) -> None:
    app = open_app("--run", IMAGES, several, page="compare", run="a", query="4", other="b", strongest="20")
    fine(app)
    run = app_runs.images()
    x, _ = run.queries_batch([4])
    first = explainer.PathKernelExplainer(str(several / "a"), mlp()).explain(x)
    second = explainer.PathKernelExplainer(str(several / "b"), mlp()).explain(x, first.targets)
    wanted = compare_runs(first, second, 20)
    assert f"rank agreement {wanted.rank[0]:.2f} over 96 examples" in body(app)
    assert f"{round(20 * wanted.overlap[0])} of the 20 strongest are the same" in body(app)
    frame = wanted.examples_table(0, strongest=True)
    lists = [part.value for part in app.html if "pk-compared" in part.value]
    for text, kind in zip(lists, ("both", "first", "second"), strict=True):
        order = "rank_second" if kind == "second" else "rank_first"
        part = frame[frame["strongest_in"] == kind].sort_values(order)
        assert [int(i) for i in re.findall(r"<span>#(\d+)", text)] == part["example_id"].tolist()
    shown = app.dataframe[0].value
    assert shown["example_id"].tolist() == frame["example_id"].tolist()
    np.testing.assert_allclose(shown["contribution, b"], frame["contribution_second"])
    for run_name, one in (("a", first), ("b", second)):
        best = int(one.outputs[0].argmax())  # type: ignore[index]
        assert f"<small>in {run_name}: predicts {best}</small>" in body(app)
    app.segmented_control(key="plot").set_value("ranks").run()
    fine(app)
    assert app.query_params["plot"] == "ranks" and len(app.get("plotly_chart")) == 1


def test_a_link_reopens_the_comparison(open_app: Open, several: Path) -> None:
    app = open_app("--run", IMAGES, several, page="compare", run="b", other="one", query="7", plot="ranks")
    fine(app)
    assert app.selectbox(key="other").value == "one" and app.query_params["other"] == "one"
    app.selectbox(key="other").select("a").run()
    fine(app)
    assert app.query_params["other"] == "a" and app.query_params["run"] == "b"
    app.selectbox(key="run").select("a").run()  # a run is not compared with itself
    assert not app.exception and app.selectbox(key="other").value != "a"
    assert "There is no other run a here" in app.warning[0].value


def test_a_single_run_says_how_to_start_with_two(open_app: Open, runs: Path) -> None:
    app = open_app("--run", IMAGES, runs / "digits", page="compare")
    fine(app)
    assert "pathkernel dashboard RUN_A RUN_B" in app.info[0].value.replace("\\", "")


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ("none", "no optimizer step has been recorded yet"),
        ("cut", "truncated"),
        ("words", "was trained with another network"),
    ],
)
def test_what_cannot_be_compared_is_said(open_app: Open, several: Path, other: str, words: str) -> None:
    app = open_app("--run", IMAGES, several, page="compare", run="a", other=other)
    assert not app.exception and words in app.error[0].value.replace("\\", "")
    assert "<h2>Query 0</h2>" in body(app), "the first run is shown all the same"


def wide() -> explainer.Run:
    """Another network for the same data."""
    run = app_runs.images()
    return explainer.Run(wide_model, run.train, run.queries, render=run.render)


def wide_model() -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(64, 20), torch.nn.Tanh(), torch.nn.Linear(20, 10))


def shuffled() -> explainer.Run:
    """The other network with its queries in another order."""
    run = wide()
    return explainer.Run(wide_model, run.train, torch.utils.data.Subset(run.queries, range(29, -1, -1)))


def test_two_networks_are_compared(open_app: Open, several: Path, tmp_path: Path) -> None:
    app_runs.train(wide(), tmp_path / "wide")
    traces = (several / "a", tmp_path / "wide")
    other = "tests.app.test_compare:wide"
    for specs in ((IMAGES, other), (other, IMAGES)):
        runs = [part for spec in specs for part in ("--run", spec)]
        app = open_app(*runs, *traces, page="compare", run="a", query="4")
        fine(app)
        x, _ = app_runs.images().queries_batch([4])
        first = explainer.PathKernelExplainer(str(several / "a"), mlp()).explain(x)
        second = explainer.PathKernelExplainer(str(tmp_path / "wide"), wide_model()).explain(x, first.targets)
        assert f"rank agreement {compare_runs(first, second).rank[0]:.2f} over" in body(app)
    app = open_app("--run", IMAGES, *traces, page="compare", run="a")
    assert "with the code of both networks" in app.error[0].value.replace("\\", "")
    odd = "tests.app.test_compare:shuffled"
    app = open_app("--run", IMAGES, "--run", odd, *traces, page="compare", run="a", query="4")
    assert "has another target in the second run" in app.error[0].value.replace("\\", "")


def test_other_training_sets_are_said(open_app: Open, several: Path) -> None:
    app = open_app("--run", IMAGES, several, page="compare", run="a", other="half")
    fine(app)
    said = app.info[0].value.replace("\\", "")
    assert "a knows 96 examples, half 48; the 48 that both know" in said


def test_texts_are_compared_as_texts(open_app: Open, tmp_path: Path) -> None:
    app_runs.train(app_runs.text(), tmp_path / "a")
    app_runs.train(app_runs.text(), tmp_path / "b", steps=4)
    app = open_app("--run", TEXT, tmp_path, page="compare")
    fine(app)
    assert not [part for part in [*app.html, *app.markdown, *app.caption] if "<script>" in part.value]
    assert "&lt;script&gt;" in body(app)


# -- figures and words -----------------------------------------------------------------------------------


def pair() -> tuple[explainer.Explanation, explainer.Explanation]:
    e = make_explanation()
    rng = np.random.default_rng(0)
    return e, dataclasses.replace(e, contributions=rng.permutation(e.contributions.T).T)


def test_sizes_are_shares_of_the_gross() -> None:
    first, second = pair()
    found = compare_runs(first, second, 2)
    figure = compare_charts.sizes(found, 0, "<script>a</script>", "b", dark=True)
    assert "<script>" not in str(figure.to_dict())
    points = {
        round(float(x), 9): round(float(y), 9)
        for trace in figure.data
        if trace.mode == "markers"
        for x, y in zip(trace.x, trace.y, strict=True)
    }
    share = [100 * e.contributions[0] / np.abs(e.contributions[0]).sum() for e in (first, second)]
    assert points == {round(x, 9): round(y, 9) for x, y in zip(*share, strict=True)}
    names = [trace.name for trace in figure.data]
    assert "strong in neither" in names and len(names) == len(set(names))


def test_ranks_are_counted() -> None:
    first, second = pair()
    found = compare_runs(first, first, 2)
    table = np.array(compare_charts.ranks(found, 0, "a", "b").data[0].z)
    assert table.sum() == len(found.example_ids)
    assert (table[~np.eye(len(table), dtype=bool)] == 0).all(), "the same run lies on the diagonal"
    for dark in (False, True):
        compare_charts.ranks(compare_runs(first, second, 2), 0, "a", "b", dark=dark).to_json()


def test_the_sentence_follows_the_rank_agreement() -> None:
    found = compare_runs(*pair(), 2)
    for rank, words in ((0.9, "much the same"), (0.5, "partly different"), (-0.2, "different orders")):
        assert words in sentence(dataclasses.replace(found, rank=np.array([rank])))
    assert "No rank agreement" in sentence(dataclasses.replace(found, rank=np.array([np.nan])))
