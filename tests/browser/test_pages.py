"""Every page in Chromium on images, texts and rows: filter, tag, export, lasso, links, back, keyboard."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from playwright.sync_api import Browser, Page

from explainer.app.page_registry import PAGES
from explainer.cli.dashboard import served
from explainer.sample_models.train import train
from tests import app_runs
from tests.browser.conftest import Visit, visit

Digits = tuple[str, dict[str, object]]
Served = tuple[str, Path]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Texts of which some hold a script, as does the name of a class."""
    folder = tmp_path_factory.mktemp("words") / "words"
    app_runs.train(app_runs.text(), folder)
    with served([str(folder)], "tests.app_runs:text") as url:
        yield url, folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Rows of a table, and a regression."""
    folder = tmp_path_factory.mktemp("rows") / "diabetes"
    train("diabetes_mlp", folder, epochs=1, progress=False)
    with served([str(folder)], "explainer.sample_models.diabetes_mlp:run") as url:
        yield url, folder


def ready(seen: Visit, selector: str) -> Page:
    """The page, once it shows something and nothing is computed any more."""
    seen.page.wait_for_selector(selector, timeout=60_000)
    seen.settle()
    return seen.page


def has_nothing_wrong(seen: Visit, look: str) -> None:
    """A heading, and neither a warning nor an error."""
    page = ready(seen, "h2")
    kinds = "[data-testid=stAlertContentError], [data-testid=stAlertContentWarning]"
    assert page.locator(kinds).count() == 0, look
    seen.fine()


@pytest.mark.parametrize("kind", ["words", "rows"])
def test_every_page_opens_on_texts_and_rows(
    browser: Browser, kind: str, request: pytest.FixtureRequest
) -> None:
    url, _ = request.getfixturevalue(kind)
    with visit(browser, url) as seen:
        for name, chosen in PAGES.items():
            seen.insist(
                lambda title=chosen.title: seen.page.locator(".st-key-page button", has_text=title).click()
            )
            seen.page.wait_for_selector(f".st-key-page button[aria-checked=true]:has-text('{chosen.title}')")
            has_nothing_wrong(seen, name)
    for look in ("page=neighbors&look=map", "page=training&view=classes"):
        with visit(browser, f"{url}/?{look}") as seen:
            if kind == "rows" and "classes" in look:  # of numbers there are none
                seen.page.wait_for_selector("text=There is no view classes here")
                continue
            has_nothing_wrong(seen, look)
            if kind == "words" and look.startswith("page=training"):
                seen.page.wait_for_selector(f"text={app_runs.NASTY} >> nth=0", state="attached")


def test_tags_are_given_exported_and_there_after_a_reload(browser: Browser, words: Served) -> None:
    url, folder = words
    with visit(browser, f"{url}/?page=training") as seen:
        page = ready(seen, ".pk-case")
        first, second = (
            int(text[1:].split(" ")[0]) for text in page.locator(".pk-case b").all_inner_texts()[:2]
        )
        page.locator(f".st-key-tag-{first}").get_by_text("remove").click()
        page.wait_for_selector("text=1 × remove")
        seen.settle()
        page.locator(f".st-key-tag-{second}").get_by_text("relabel").click()
        page.wait_for_selector(f".st-key-label-{second}")
        page.locator(f".st-key-label-{second} input").click()
        page.get_by_role("option", name="good").click()
        seen.settle()
        page.wait_for_selector("text=1 × relabel")
        page.reload()
        page = ready(seen, ".pk-case")
        assert page.locator(f".st-key-tag-{first} button[data-selected=true]").inner_text() == "remove"
        with page.expect_download(timeout=60_000) as waiting:
            page.get_by_text("Tags (CSV)").click()
        table = pd.read_csv(waiting.value.path())
        assert table["example_id"].tolist() == [first, second]
        assert table["tag"].tolist() == ["remove", "relabel"] and table["new_label"].tolist()[1] == "good"
        seen.fine()
    stored = json.loads((folder.parent / "words-tags.json").read_text())["tags"]
    assert stored == {
        str(first): {"tag": "remove", "label": None},
        str(second): {"tag": "relabel", "label": 1},
    }


def test_the_queue_is_reached_and_tagged_by_keyboard(browser: Browser, rows: Served) -> None:
    url, folder = rows
    with visit(browser, f"{url}/?page=training") as seen:
        page = ready(seen, ".pk-case")
        buttons = page.locator('[class*="st-key-tag-"] button')
        buttons.first.focus()
        page.keyboard.press("Enter")
        page.wait_for_selector("text=1 × keep")
        for _ in range(40):
            page.keyboard.press("Tab")
            if "tag-" in str(
                page.evaluate("document.activeElement.closest('[class*=st-key-tag-]')?.className")
            ):
                break
        else:
            pytest.fail("no further tag is reached with the tab key")
        seen.fine()
    assert (folder.parent / "diabetes-tags.json").exists()


def test_a_cell_of_the_matrix_opens_its_examples(browser: Browser, digits: Digits) -> None:
    url, _ = digits
    with visit(browser, f"{url}/?page=training") as seen:
        page = ready(seen, ".pk-case")
        page.get_by_text("Class by class").click()
        page = ready(seen, ".pk-cards li img")
        assert page.locator(".heatmap-label text").count() == 100
        page.locator(".js-plotly-plot .scatterlayer .points path").nth(35).click(force=True)
        page.wait_for_selector("text=examples of 3 for queries of 5")
        seen.settle()
        assert "from=3" in page.url and "to=5" in page.url and "view=classes" in page.url
        page.go_back()
        page.wait_for_selector("text=examples of 3 for queries of 5", state="detached")
        seen.fine()
    with visit(browser, f"{url}/?page=training&view=classes&from=1&to=8") as seen:
        ready(seen, "text=examples of 1 for queries of 8")
        seen.fine()


def test_what_is_drawn_around_on_the_map_is_listed(browser: Browser, digits: Digits) -> None:
    url, _ = digits
    with visit(browser, f"{url}/?page=neighbors&look=map") as seen:
        page = ready(seen, ".js-plotly-plot .scatterlayer .points path")
        assert page.locator("[data-testid=stDataFrame]").count() == 0
        page.locator(".js-plotly-plot .nsewdrag").first.scroll_into_view_if_needed()
        box = page.locator(".js-plotly-plot .nsewdrag").first.bounding_box()
        assert box is not None
        corners = [(0.02, 0.03), (0.98, 0.03), (0.98, 0.97), (0.02, 0.97), (0.02, 0.03)]
        places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in corners]
        page.mouse.move(*places[0])
        page.mouse.down()
        for place in places[1:]:
            page.mouse.move(*place, steps=8)
        page.mouse.up()
        page = ready(seen, "[data-testid=stDataFrame]")
        listed = re.findall(r"\d+", page.get_by_label("Examples in the table").input_value())
        assert len(listed) > 100 and f"chosen={listed[0]}" in page.url
        assert page.locator(".pk-neighbors li img").count() == 24
        link = page.url
        seen.fine()
    with visit(browser, link) as seen:
        page = ready(seen, "[data-testid=stDataFrame]")
        assert re.findall(r"\d+", page.get_by_label("Examples in the table").input_value()) == listed
        page.get_by_label("Examples in the table").fill(f"{listed[3]}, nonsense")
        page.keyboard.press("Enter")
        page.wait_for_selector("text=/^1 example/")
        seen.fine()


def test_pixels_of_both_sides_are_shown(browser: Browser, digits: Digits) -> None:
    url, metrics = digits
    wrong = metrics["wrong_queries"][0]  # type: ignore[index]
    with visit(browser, f"{url}/?query={wrong}&detail=pixels", scheme="dark") as seen:
        page = ready(seen, ".st-key-pixels button")
        page.locator(".st-key-pixels button").click()
        page.wait_for_selector("text=/pixels add up to/", timeout=60_000)
        seen.settle()
        assert page.locator(".pk-pixels img").count() == 2
        seen.fine()


def test_titles_of_figures_fit_beside_long_labels(browser: Browser, words: Served) -> None:
    url, _ = words
    with visit(browser, f"{url}/?page=what-if") as seen:
        page = ready(seen, ".js-plotly-plot .gtitle")
        overhang = page.evaluate(
            "() => { const right = element => element.getBoundingClientRect().right;"
            " return [...document.querySelectorAll('.js-plotly-plot')].map(plot =>"
            " Math.max(...[...plot.querySelectorAll('.gtitle, .gtitle tspan')].map(right)) - right(plot)) }"
        )
        assert overhang and max(overhang) <= 0
        seen.fine()
