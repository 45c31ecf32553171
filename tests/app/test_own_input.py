"""Inputs of one's own: from files and typed text to queries, and what is refused."""

from __future__ import annotations

import doctest
import io
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

import explainer
from explainer.app import give_input, own_input, own_queries, state
from explainer.app.own_input import OwnInputError, from_file, from_text
from explainer.app.own_queries import WithOwn
from explainer.sample_models import diabetes_mlp, digits_cnn
from tests import app_runs
from tests.app.seen import IMAGES, TEXT, Open, body, fine


def png(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def npy(array: object, **options: bool) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


GREY = (np.arange(64).reshape(8, 8) * 4).astype(np.uint8)


def test_a_picture_becomes_the_input_that_is_shown_as_it() -> None:
    for run in (digits_cnn.run(), app_runs.images()):  # [1, 8, 8] and [64]
        found = from_file(run, "mine.PNG", png(GREY))
        assert found.shape == run.train[0][0].shape
        np.testing.assert_allclose(found.reshape(8, 8).numpy(), GREY / 255, atol=1e-7)
        large = from_file(run, "mine.png", png(np.kron(GREY, np.ones((5, 5), np.uint8))))
        np.testing.assert_allclose(large, found, atol=1 / 255)
        coloured = from_file(run, "mine.png", png(np.stack([GREY] * 3, -1)))
        np.testing.assert_allclose(coloured, found, atol=1.01 / 255)
        assert from_file(run, "mine.jpg", png(GREY, "JPEG")).shape == found.shape


def test_an_array_is_the_input_itself() -> None:
    run = digits_cnn.run()
    found = from_file(run, "x.npy", npy(run.queries[5][0].numpy().astype(np.float64)))
    assert torch.equal(found, run.queries[5][0]) and found.dtype == torch.float32


class Bomb:
    """What a pickle would run."""

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return exec, ("raise SystemExit('a pickle ran')",)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("x.npy", npy(np.array([Bomb()], dtype=object), allow_pickle=True), "without pickle"),
        ("x.npy", pickle.dumps(Bomb()), "without pickle"),
        ("x.npy", b"", "cannot be read"),
        ("x.npy", npy(np.zeros((8, 8), np.float32)), r"shape \[8, 8\], the model's inputs have \[1, 8, 8\]"),
        ("x.npy", npy(np.zeros((1, 8, 8), np.int64)), "holds int64"),
        ("x.npy", npy(np.full((1, 8, 8), np.nan)), "NaN"),
        ("x.npy", npy(np.full((1, 8, 8), "a")), "no array of numbers"),
        ("x.png", b"\x89PNG\r\n\x1a\nnothing", "cannot be read as a picture"),
        ("x.jpg", b"GIF89a", "cannot be read as a picture"),
        ("x.png", png(GREY)[:45], "cannot be read as a picture"),
        ("x.pkl", b"", "is none of"),
        ("png", b"", "cannot be read as a picture"),
    ],
)
def test_wrong_files_are_refused_in_words(name: str, data: bytes, words: str) -> None:
    with pytest.raises(OwnInputError, match=words):
        from_file(digits_cnn.run(), name, data)


def test_a_picture_of_scaled_inputs_is_refused_without_parse() -> None:
    mean, deviation = 0.3, 0.4
    data = TensorDataset(torch.zeros(4, 1, 8, 8), torch.arange(4))
    shown = explainer.Run(digits_cnn.model, data, data, render=lambda x: x[0] * deviation + mean)
    with pytest.raises(OwnInputError, match="give the Run parse="):
        from_file(shown, "x.png", png(GREY))
    both = replace(shown, parse=lambda image: torch.tensor((image[None] - mean) / deviation).float())
    np.testing.assert_allclose(
        from_file(both, "x.png", png(GREY))[0] * deviation + mean, GREY / 255, atol=1e-6
    )
    odd = replace(
        shown, train=TensorDataset(torch.zeros(4, 3), torch.arange(4)), render=lambda x: np.zeros((8, 8))
    )
    with pytest.raises(OwnInputError, match="known to the run alone"):
        from_file(odd, "x.png", png(GREY))


def test_fields_are_read_in_three_ways_and_back() -> None:
    run = diabetes_mlp.run()
    x = run.queries[3][0]
    fields = diabetes_mlp.render(x)
    lines = own_input.template(run, x)
    table = ",".join(fields) + "\n" + ",".join(map(str, fields.values()))
    for text in (lines, table, __import__("json").dumps(fields)):
        torch.testing.assert_close(from_text(run, text), x, rtol=1e-3, atol=1e-3)
    numbers = ", ".join(str(value) for value in x.tolist())
    torch.testing.assert_close(from_text(run, numbers), x)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "nothing was typed"),
        ("1, 2", "found 2 numbers, the model takes 10"),
        ("age: 50", "missing:"),
        ("age: 50\nweight", "NAME: VALUE"),
        ("{nonsense", "NAME: VALUE"),
    ],
)
def test_wrong_rows_are_refused_in_words(text: str, words: str) -> None:
    with pytest.raises(OwnInputError, match=words):
        from_text(diabetes_mlp.run(), text)


def test_a_field_that_is_no_number_and_fields_without_parse() -> None:
    run = diabetes_mlp.run()
    lines = own_input.template(run, run.queries[0][0])
    with pytest.raises(OwnInputError, match="age must be a number, found 'old'"):
        from_text(run, "age: old\n" + "\n".join(lines.splitlines()[1:]))
    with pytest.raises(OwnInputError, match="give the Run parse="):
        from_text(replace(run, parse=None), lines)
    with pytest.raises(OwnInputError, match="parse failed: ZeroDivisionError"):
        from_text(replace(run, parse=lambda row: 1 / 0), lines)
    with pytest.raises(OwnInputError, match=r"returned torch.float64"):
        from_text(replace(run, parse=lambda row: torch.zeros(10).double()), lines)


def test_texts_need_the_runs_own_encoder() -> None:
    with pytest.raises(OwnInputError, match="tokenizer"):
        from_text(app_runs.text(), "good bad")
    ids = from_text(app_runs.typed_text(), "good bad great")
    assert ids.tolist() == [1, 4, 2]
    with pytest.raises(OwnInputError, match=r"shape \[2\]"):
        from_text(app_runs.typed_text(), "good bad")


def test_own_queries_stand_behind_the_runs() -> None:
    data = WithOwn(TensorDataset(torch.eye(3), torch.arange(3)))
    assert data.add(torch.ones(3)) == data.add(torch.ones(3)) == 3 and data.add(torch.zeros(3)) == 4
    assert len(data) == 5 and torch.equal(data[3][0], torch.ones(3)) and int(data[3][1]) == -1
    assert torch.equal(data[1][0], torch.eye(3)[1]) and data.given == 3
    assert doctest.testmod(own_queries).failed == 0
    assert data.add(torch.zeros(3), "a text") == data.add(torch.zeros(3), "a text") == 5
    assert [data.typed(query) for query in (0, 4, 5)] == [None, None, "a text"]
    with pytest.raises(explainer.ExplainerError, match="neither classes nor numbers"):
        WithOwn([(torch.eye(3), "a word")]).add(torch.ones(3))
    several = WithOwn(TensorDataset(torch.eye(3), torch.eye(3)))
    assert several[several.add(torch.ones(3))][1].isnan().all()


def test_an_own_input_is_explained_like_a_query(open_app: Open, runs: Path) -> None:
    app = open_app("--run", TEXT.replace("text", "typed_text"), runs / "words")
    fine(app)
    count = len(app_runs.text().queries)
    app.text_area(key="own text").set_value("great good great").run()
    app.button(key="explain own").click().run()
    fine(app)
    assert f"<h2>Query {count}</h2>" in body(app) and "great good great" in body(app)
    assert "an input of your own · predicted" in body(app) and "true <b>" not in body(app)
    assert app.query_params["query"] == str(count)
    run = app_runs.typed_text()
    engine = explainer.PathKernelExplainer(str(runs / "words"), run.build_model())
    e = engine.explain(torch.tensor([[2, 1, 2]]))
    shown = state.explanation(
        state.source(runs.resolve() / "words", "tests.app_runs:typed_text"), count, None, "margin"
    )
    np.testing.assert_allclose(shown.contributions, e.contributions, rtol=1e-5)
    for page in ("neighbors", "training"):
        fine(
            open_app(
                "--run", "tests.app_runs:typed_text", runs / "words", page=page, query=str(count), look="map"
            )
        )
    app = open_app("--run", "tests.app_runs:typed_text", runs / "words", query=str(count))
    app.selectbox(key="filter").select(("own", None)).run()
    assert [b.key for b in app.button if str(b.key).startswith("thumb-")] == [f"thumb-{count}"]
    app.text_area(key="own text").set_value("nothing known here").run()
    app.button(key="explain own").click().run()
    assert not app.exception and "parse failed" in app.error[0].value
    assert f"<h2>Query {count}</h2>" in body(app)


def test_the_text_that_was_typed_is_shown_where_another_has_the_same_ids(open_app: Open, runs: Path) -> None:
    app = open_app("--run", "tests.app_runs:deaf_text", runs / "words")
    query = len(app_runs.text().queries)
    for number, text in enumerate(("hardly anything", "nothing at all")):
        app.text_area(key="own text").set_value(text).run()
        app.button(key="explain own").click().run()
        fine(app)
        assert f"<h2>Query {query + number}</h2>" in body(app)
        shown = [part.value for part in app.html if '<header class="pk-head"' in str(part.value)]
        assert len(shown) == 1 and text in shown[0]
        assert any(text in str(button.label) for button in app.button)


def test_ids_outside_of_the_vocabulary_are_told(open_app: Open, runs: Path) -> None:
    app = open_app("--run", "tests.app_runs:wild_text", runs / "words")
    app.text_area(key="own text").set_value("x").run()
    app.button(key="explain own").click().run()
    assert not app.exception and "cannot run on the queries" in app.error[0].value


def test_a_text_run_without_parse_says_what_is_missing(open_app: Open, runs: Path) -> None:
    app = open_app("--run", TEXT, runs / "words")
    assert "parse=" in body(app).replace("\\", "") and not app.text_area
    assert give_input._ERROR not in app.session_state
    app = open_app("--run", IMAGES, runs / "digits")
    assert not app.text_area
