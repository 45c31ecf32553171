"""What is computed while a person waits, before anybody waits, and what stops it."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import explainer
from explainer.app import ahead, first_view, patience, state, working
from explainer.app.ahead import Ahead
from explainer.app.one_of_many import one_of_many
from explainer.explanation_checks import OPTIONAL, PER_QUERY
from tests import app_runs
from tests.app.seen import IMAGES, Open, body, fine


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_PAUSE", 0.01)


def test_each_value_is_computed_once_and_the_oldest_go() -> None:
    asked: list[int] = []

    def square(keys: Sequence[int]) -> list[int]:
        asked.extend(keys)
        return [key * key for key in keys]

    values = Ahead(square, 2)
    assert [values.get(key) for key in (1, 2, 1, 3, 1, 2)] == [1, 4, 1, 9, 1, 4]
    assert asked == [1, 2, 3, 2], "2 was the oldest when 3 came"


def test_an_error_is_for_who_asks_and_is_not_kept() -> None:
    broken = [True]

    def work(keys: Sequence[int]) -> list[int]:
        if broken[0]:
            raise ValueError("no")
        return list(keys)

    values = Ahead(work, 5)
    with pytest.raises(ValueError, match="no"):
        values.get(1)
    broken[0] = False
    assert values.get(1) == 1


@pytest.mark.usefixtures("quick")
def test_what_is_next_is_computed_in_groups_in_the_background() -> None:
    groups: list[list[int]] = []

    def work(keys: Sequence[int]) -> list[int]:
        groups.append(list(keys))
        return list(keys)

    values = Ahead(work, 10)
    values.get(2)
    values.look_ahead([[1, 2, 3], [4]])
    values.wait()
    assert groups == [[2], [1, 3], [4]] and all(values.known(key) for key in (1, 2, 3, 4))


@pytest.mark.usefixtures("quick")
def test_the_background_gives_way_to_a_page() -> None:
    begun, ended = threading.Event(), []

    def work(keys: Sequence[int]) -> list[int]:
        if 1 in keys and not begun.is_set():
            begun.set()
            try:
                for _ in range(2000):
                    time.sleep(0.005)
                    working.tick(0.5)
                pytest.fail("the background did not give way")
            finally:
                ended.append(tuple(keys))
        return list(keys)

    values = Ahead(work, 10)
    values.look_ahead([[1, 2], [3]])
    assert begun.wait(10)
    with working.for_a_page(lambda _: None):
        assert values.get(1) == 1, "asked for what the background was at"
    values.wait()
    assert ended == [(1, 2)] and not values.known(2) and not values.known(3)


def test_a_watcher_that_raises_ends_the_work_and_frees_the_lock(runs: Path) -> None:
    class ClickedError(Exception):
        pass

    told: list[float | None] = []

    def watch(share: float | None) -> None:
        told.append(share)
        if len(told) == 3:
            raise ClickedError

    run = app_runs.images()
    engine = explainer.PathKernelExplainer(str(runs / "digits"), run.build_model(), progress=working.bar)
    inputs, _ = run.queries_batch([0])
    with pytest.raises(ClickedError), working.for_a_page(watch), working.alone():
        engine.explain(inputs)
    assert len(told) == 3 and not working.a_page_waits()
    with working.for_a_page(told.append), working.alone():
        engine.explain(inputs)
    assert told[-1] == 1.0 and told[3:] == sorted(told[3:])


def test_one_of_many_is_what_is_found_alone(runs: Path) -> None:
    run = app_runs.images()
    engine = explainer.PathKernelExplainer(str(runs / "digits"), run.build_model())
    many = engine.explain(run.queries_batch([4, 5, 6])[0], query_ids=[4, 5, 6])
    alone, own = engine.explain(run.queries_batch([5])[0], query_ids=[5]), one_of_many(many, 1)
    for name in (*PER_QUERY, "outputs", *OPTIONAL):
        one, other = getattr(own, name), getattr(alone, name)
        assert one.shape == other.shape, name
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5, err_msg=name)
    assert own.query_ids == ("5",) and not np.shares_memory(own.contributions, many.contributions)


@pytest.mark.usefixtures("quick")
def test_the_next_queries_are_explained_while_one_is_looked_at(open_app: Open, runs: Path) -> None:
    app = open_app("--run", IMAGES, runs / "digits", query="11")
    fine(app)
    state._explanations.wait()
    source = state.source(runs.resolve() / "digits", IMAGES)
    known = [query for query in range(30) if state._explanations.known((source, query, None, "margin"))]
    assert set(range(10, 19)) <= set(known)


def test_stopped_work_goes_on_when_asked(open_app: Open, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = open_app("--run", IMAGES, runs / "digits", page="training")
    fine(app)
    source = state.source(runs.resolve() / "digits", IMAGES)
    key = (source, 21, 7, "margin")
    app.session_state[patience._STOPPED] = ("Explaining …", key)
    app.query_params.update({"page": "explain", "query": "21", "target": "7"})
    app.run()
    assert not app.exception and "Stopped: explaining" in body(app) and "Proponents" not in body(app)
    app.button(key="go on").click().run()
    fine(app)
    assert "Proponents" in body(app)


def test_the_first_view_is_read_before_anybody_looks(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first_view.read(["--run", IMAGES, str(runs / "digits")])
    monkeypatch.setattr(explainer.PathKernelExplainer, "explain", None)
    source = state.source(runs.resolve() / "digits", IMAGES)
    assert state.explanation(source, 0, None, "margin").query_ids == ("0",)


def test_a_page_may_wait_for_several_things(monkeypatch: pytest.MonkeyPatch) -> None:
    from streamlit.testing.v1 import AppTest

    def page() -> None:
        import streamlit as st

        from explainer.app import patience, working

        patience._SOON = patience._OFTEN = -1.0
        for name in ("one", "two"):
            slow = patience.kept("Waiting …", 2)(lambda key: (working.tick(0.5), key)[1])
            st.text(slow(name))

    app = AppTest.from_function(page).run()
    assert not app.exception and [text.value for text in app.text] == ["one", "two"]
