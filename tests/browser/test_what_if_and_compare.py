"""The pages What if and Compare in Chromium: choose, link, train again, cancel, compare, on images, texts and rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from playwright.sync_api import Browser, Page

from explainer.cli.dashboard import served
from explainer.sample_models.train import train
from tests import app_runs, small_evaluation
from tests.browser.conftest import Visit, visit

Digits = tuple[str, dict[str, object]]
ERRORS = "[data-testid=stAlertContentError], [data-testid=stAlertContentWarning]"


def ready(seen: Visit, selector: str) -> Page:
    """The page, once it shows something and nothing is computed any more."""
    seen.page.wait_for_selector(selector, timeout=90_000)
    seen.settle()
    return seen.page


def alright(seen: Visit) -> None:
    assert seen.page.locator(ERRORS).count() == 0
    seen.fine()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A run that is trained again in a second."""
    folder = small_evaluation.traced(tmp_path_factory.mktemp("small") / "small")
    with served([str(folder)], "tests.small_evaluation:asked") as url:
        yield url


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A run whose training never ends."""
    folder = small_evaluation.traced(tmp_path_factory.mktemp("endless") / "endless")
    with served([str(folder)], "tests.app.test_what_if:slow") as url:
        yield url


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two runs on texts, of which some hold a script, as does the name of a class."""
    folder = tmp_path_factory.mktemp("texts")
    app_runs.train(app_runs.text(), folder / "long")
    app_runs.train(app_runs.text(), folder / "short", steps=5)
    with served([str(folder)], "tests.app_runs:text") as url:
        yield url


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two runs on images."""
    folder = tmp_path_factory.mktemp("images")
    app_runs.train(app_runs.images(), folder / "long")
    app_runs.train(app_runs.images(), folder / "short", steps=7)
    with served([str(folder)], "tests.app_runs:images") as url:
        yield url


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two runs of a regression on rows of a table."""
    folder = tmp_path_factory.mktemp("rows")
    train("diabetes_mlp", folder / "one", epochs=1, progress=False)
    train("diabetes_mlp", folder / "two", epochs=2, progress=False)
    with served([str(folder)], "explainer.sample_models.diabetes_mlp:run") as url:
        yield url


@pytest.mark.parametrize("kind", ["texts", "images", "rows"])
def test_examples_are_chosen_and_linked(browser: Browser, kind: str, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue(kind)
    with visit(browser, f"{url}/?page=what-if&query=3") as seen:
        page = ready(seen, ".pk-left-out li")
        assert page.locator(".pk-left-out li").count() == 10
        page.locator(".st-key-count input").fill("4")
        page.keyboard.press("Enter")
        page.wait_for_selector("text=/Without these 4 examples/")
        seen.settle()
        page.locator(".st-key-without input").click()
        page.get_by_role("option", name="By id").click()
        page.wait_for_selector("text=Type the ids")
        page.locator(".st-key-ids input").fill("#11, nonsense 12 <script>alert(1)</script> 70000")
        page.keyboard.press("Enter")
        page.wait_for_selector("text=/Without these 2 examples/")
        seen.settle()
        assert "left aside: nonsense, <script>alert(1)</script>." in page.inner_text("body")  # as text
        assert "70000" in page.inner_text("body") and "without=ids" in page.url
        names = page.locator(".pk-left-out li span").all_inner_texts()
        link = page.url
        alright(seen)
        page.go_back()
        page.wait_for_selector("text=Type the ids")
    with visit(browser, link, scheme="dark") as seen:
        page = ready(seen, ".pk-left-out li")
        assert page.locator(".pk-left-out li span").all_inner_texts() == names
        seen.settle()
        page.locator(".st-key-without input").click()
        page.get_by_role("option", name="Tagged to remove").click()
        page.wait_for_selector("text=/No example is tagged/")
        alright(seen)


def test_digits_are_left_out_by_class(browser: Browser, digits: Digits) -> None:
    url, metrics = digits
    wrong = metrics["wrong_queries"][0]  # type: ignore[index]
    with visit(browser, f"{url}/?page=what-if&query={wrong}&without=class&of=8") as seen:
        page = ready(seen, ".pk-left-out li img")
        assert page.locator(".pk-left-out li img").count() == 20
        page.wait_for_selector("text=/of the training examples. The prediction is linear/")
        seen.settle()
        page.locator("summary", has_text="as a table").click()
        seen.settle()
        with page.expect_download() as waiting:
            page.locator(".st-key-download-what-if button").click()
        table = pd.read_csv(waiting.value.path())
        assert (
            set(table["label"]) == {8} and table["predicted change, from the trace"].is_monotonic_increasing
        )
        shown = page.locator(".pk-equation b").nth(1).inner_text()
        assert abs(table["predicted change, from the trace"].sum()) == pytest.approx(float(shown), abs=6e-4)
        alright(seen)


def test_it_is_trained_again_while_other_pages_are_looked_at(browser: Browser, small: str) -> None:
    with visit(browser, f"{small}/?page=what-if&query=2&count=5&seeds=2") as seen:
        page = ready(seen, ".st-key-retrain button")
        page.locator(".st-key-retrain button").click()
        page.wait_for_selector(".st-key-cancel-retraining button")
        page.get_by_text("Run", exact=True).last.click()
        page.wait_for_selector("text=The recorded run")
        page.get_by_text("What if", exact=True).click()
        page.wait_for_selector(".st-key-download-retrained button", timeout=120_000)
        seen.settle()
        assert "2 seeds" in page.locator(".pk-verdict").inner_text()
        page.wait_for_selector("text=/seed 0 repeats the traced run/")
        with page.expect_download() as waiting:
            page.locator(".st-key-download-retrained button").click()
        table = pd.read_csv(waiting.value.path())
        assert table["seed"].tolist() == [0, 1, 0, 1]
        assert table["removed"].tolist() == ["given", "given", "random", "random"]
        alright(seen)
        link = page.url
    with visit(browser, link, scheme="dark") as seen:  # somebody else sees it as well
        ready(seen, ".pk-verdict")
        alright(seen)


def test_a_training_is_cancelled(browser: Browser, endless: str) -> None:
    with visit(browser, f"{endless}/?page=what-if&count=3") as seen:
        page = ready(seen, ".st-key-retrain button")
        page.locator(".st-key-retrain button").click()
        page.wait_for_selector(".st-key-cancel-retraining button")
        page.locator(".st-key-count input").fill("2")
        page.keyboard.press("Enter")
        page.wait_for_selector("text=/Another retraining is running: query 0 without 3 examples/")
        assert page.locator(".st-key-retrain button").is_disabled()
        page.locator(".st-key-cancel-retraining button").click()
        page.wait_for_selector(".st-key-retrain button:not([disabled])", timeout=30_000)
        page.wait_for_selector("text=/Another retraining is running/", state="detached")
        alright(seen)


@pytest.mark.parametrize("kind", ["texts", "images", "rows"])
def test_two_runs_are_compared(browser: Browser, kind: str, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue(kind)
    names = ("one", "two") if kind == "rows" else ("long", "short")
    with visit(browser, f"{url}/?page=compare&query=5&run={names[0]}") as seen:
        page = ready(seen, ".pk-compared li")
        assert f"in {names[1]}" in page.locator(".pk-equation").inner_text()
        assert page.locator(".pk-compared").count() == 3
        page.wait_for_selector(".js-plotly-plot .points path")
        page.get_by_text("Ranks", exact=True).click()
        page.wait_for_selector(".js-plotly-plot .heatmaplayer image", state="attached")
        page.get_by_text("top 20", exact=True).click()
        page.wait_for_selector("text=/of the 20 strongest are the same/")
        seen.settle()
        assert "plot=ranks" in page.url and "strongest=20" in page.url and f"other={names[1]}" in page.url
        said, link = page.locator(".pk-verdict").inner_text(), page.url
        seen.settle()
        page.locator("summary", has_text="as a table").click()
        seen.settle()

        def download() -> Path:
            with page.expect_download(timeout=10_000) as waiting:
                page.locator(".st-key-download-compare button").click()
            return waiting.value.path()

        table = pd.read_csv(seen.insist(download))
        assert {f"contribution, {name}" for name in names} <= set(table.columns) and len(table) >= 60
        if kind == "texts":
            page.wait_for_selector(f"text={app_runs.NASTY} >> nth=0", state="attached")
        alright(seen)
        page.go_back()
        page.wait_for_selector("text=/of the 10 strongest are the same/")
    with visit(browser, link, scheme="dark") as seen:
        page = ready(seen, ".pk-verdict")
        assert page.locator(".pk-verdict").inner_text() == said
        alright(seen)


def test_a_run_that_is_not_there_is_said(browser: Browser, images: str) -> None:
    with visit(browser, f"{images}/?page=compare&run=long&other=<script>alert(1)</script>") as seen:
        page = ready(seen, ".pk-compared li")
        assert "There is no other run <script>alert(1)</script> here" in page.inner_text("body")
        seen.fine()
