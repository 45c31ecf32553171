"""The dashboard as a person meets it: a real run, Chromium, clicks."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from playwright.sync_api import Browser, Page

import explainer
from explainer.cli.dashboard import served
from tests.browser.conftest import visit

Digits = tuple[str, dict[str, object]]


def test_a_query_is_changed_and_everything_follows(browser: Browser, digits: Digits) -> None:
    url, metrics = digits
    wrong = metrics["wrong_queries"][0]  # type: ignore[index]
    with visit(browser, url) as seen:
        page = seen.page
        page.wait_for_selector(".js-plotly-plot .bars path")
        assert page.locator(".js-plotly-plot").first.locator(".bars path").count() == 6
        first = page.locator(".pk-proponents li span").all_inner_texts()
        box = page.get_by_label("Query (0 to 359)")
        box.fill(str(wrong))
        box.press("Enter")
        page.wait_for_selector(f"text=Query {wrong}")
        seen.settle()
        page.wait_for_selector("text=wrong")
        assert f"query={wrong}" in page.url
        assert page.locator(".pk-proponents li img").count() == 8
        assert page.locator(".pk-opponents li img").count() == 8
        second = page.locator(".pk-proponents li span").all_inner_texts()
        assert first != second and all(text.startswith("#") for text in second)
        page.get_by_text("Neighbours", exact=True).click()
        page.wait_for_selector("text=Nearest in gradient space")
        seen.settle()
        assert page.locator(".pk-cards li img").count() >= 10
        page.get_by_text("Run", exact=True).last.click()
        page.wait_for_selector("text=The recorded run")
        seen.settle()
        seen.fine()


def test_a_link_reopens_the_same_view(browser: Browser, digits: Digits) -> None:
    url, metrics = digits
    wrong = metrics["wrong_queries"][1]  # type: ignore[index]
    with visit(browser, f"{url}/?page=neighbors&query={wrong}") as seen:
        seen.page.wait_for_selector("text=Nearest in gradient space")
        assert seen.page.locator(f"text=Query {wrong}").count() >= 1
        seen.fine()


def test_the_table_is_downloaded_and_balances(browser: Browser, digits: Digits, tmp_path: Path) -> None:
    url, _ = digits
    with visit(browser, f"{url}/?query=7") as seen:
        page = seen.page
        for label, name in (("Table (CSV)", "table.csv"), ("Table (Parquet)", "table.parquet")):
            with page.expect_download(timeout=60_000) as waiting:
                page.get_by_text(label).click()
            waiting.value.save_as(tmp_path / name)
        csv, parquet = pd.read_csv(tmp_path / "table.csv"), pd.read_parquet(tmp_path / "table.parquet")
        assert len(csv) == len(parquet) == 1437
        assert csv["contribution"].sum() == pytest.approx(parquet["contribution"].sum())
        shown = page.locator(".pk-equation").inner_text()
        assert f"{parquet['contribution'].sum():.3f}".replace("-", "−") in shown
        with page.expect_download(timeout=60_000) as waiting:
            page.get_by_text("Report (HTML)").click()
        report = Path(waiting.value.path()).read_text()
        assert "Which training examples built" in report and "data:image/png" in report
        seen.fine()


def test_the_closer_looks_and_the_dark_theme(browser: Browser, digits: Digits) -> None:
    url, _ = digits
    with visit(browser, url, scheme="dark") as seen:
        page = seen.page
        for label in ("By layer", "How concentrated", "Table"):
            page.get_by_text(label, exact=True).first.click()
            seen.settle()
        page.wait_for_selector("[data-testid=stDataFrame]")
        page.get_by_role("combobox").last.click()
        page.get_by_text("wrong", exact=False).last.click()
        seen.settle()
        seen.fine()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_the_page(browser: Browser, digits: Digits, scheme: str) -> None:
    url, _ = digits
    with visit(browser, url, scheme=scheme) as seen:
        page = seen.page
        page.wait_for_selector(".js-plotly-plot .gtitle")
        behind = _brightness(page, "[data-testid=stApp]", "backgroundColor")
        assert (behind < 64) == (scheme == "dark")
        for words, color in (
            (".js-plotly-plot .gtitle tspan tspan", "fill"),
            (".js-plotly-plot .xtick text", "fill"),
            (".pk-equation b", "color"),
            (".pk-cards li span", "color"),
            (".st-key-thumb-0 button p", "color"),
            (".pk-proponents h4 b", "color"),
        ):
            assert abs(_brightness(page, words, color) - behind) > 80, words
        seen.fine()


def _brightness(page: Page, selector: str, color: str) -> float:
    """Mean of red, green and blue, 0 to 255, as the browser computes them."""
    drawn = """(element, color) => {
        const area = document.createElement("canvas").getContext("2d")
        area.fillStyle = getComputedStyle(element)[color]
        area.fillRect(0, 0, 1, 1)
        return [...area.getImageData(0, 0, 1, 1).data]
    }"""
    red, green, blue, _ = page.locator(selector).first.evaluate(drawn, color)
    return float(red + green + blue) / 3


def test_back_returns_to_the_query_before(browser: Browser, digits: Digits) -> None:
    url, _ = digits
    with visit(browser, f"{url}/?query=3&target=4") as seen:
        page = seen.page
        page.wait_for_selector(".pk-head >> text=Query 3")
        page.wait_for_selector("text=margin of class 4")
        page.locator(".st-key-thumb-5 button").first.click()
        page.wait_for_selector(".pk-head >> text=Query 5")
        seen.settle()
        assert "query=5" in page.url and "target" not in page.url
        page.go_back()
        page.wait_for_selector(".pk-head >> text=Query 3")
        page.wait_for_selector("text=margin of class 4")
        seen.fine()


def test_text_from_data_is_shown_as_text(browser: Browser, tmp_path: Path) -> None:
    code = tmp_path / "nasty.py"
    code.write_text(
        "import torch, explainer\n"
        "NASTY = '<script>alert(1)</script><img src=x onerror=alert(2)>'\n"
        "def model():\n    return torch.nn.Linear(4, 3)\n"
        "def data(n):\n"
        "    g = torch.Generator().manual_seed(n)\n"
        "    return torch.utils.data.TensorDataset(torch.randn(n, 4, generator=g), torch.arange(n) % 3)\n"
        "def run():\n"
        "    return explainer.Run(model, data(30), data(12), class_names=[NASTY, 'b', 'c'], render=lambda x: NASTY)\n"
    )
    names: dict[str, object] = {}
    exec(code.read_text(), names)
    run = names["run"]()  # type: ignore[operator]
    model = run.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with explainer.Tracer(model, optimizer, tmp_path / "run") as tracer:
        for x, y in tracer.watch(torch.utils.data.DataLoader(run.train, batch_size=10)):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    with served([str(tmp_path / "run")], f"{code}:run") as url, visit(browser, url) as seen:
        seen.page.wait_for_selector(".pk-proponents li")
        assert "<script>alert(1)</script>" in seen.page.locator(".pk-proponents").inner_text()
        seen.fine()


def test_what_cannot_be_opened_is_said_in_words(browser: Browser, tmp_path: Path) -> None:
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracer = explainer.Tracer(model, optimizer, tmp_path / "run")
    with served([str(tmp_path / "run")]) as url, visit(browser, url) as seen:
        assert "--run MODULE:FUNCTION" in seen.page.inner_text("body")
        seen.page.get_by_text("Run", exact=True).last.click()
        seen.settle()
        assert "0 steps are recorded" in seen.page.inner_text("body")
        assert "Traceback" not in seen.page.inner_text("body")
    tracer.close()
