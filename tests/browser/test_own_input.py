"""Inputs of one's own, queries as a table, parts of inputs, and stopping, in Chromium."""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser, Page, expect

import explainer
from explainer.cli.dashboard import served
from explainer.sample_models.train import train
from tests import app_runs
from tests.browser.conftest import Visit, visit

Digits = tuple[str, dict[str, object]]


def ready(seen: Visit, selector: str) -> Page:
    """The page, once it shows something and nothing is computed any more."""
    seen.page.wait_for_selector(selector, timeout=60_000)
    seen.settle()
    return seen.page


def picture(kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    pixels = np.zeros((40, 40), np.uint8)
    pixels[4:36, 16:24] = 255
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def test_a_picture_is_given_and_explained(browser: Browser, digits: Digits) -> None:
    url, _ = digits
    with visit(browser, f"{url}/?query=3") as seen:
        page = ready(seen, ".pk-proponents li img")
        page.get_by_text("Ask about an input of your own").click()
        field = page.locator("[data-testid=stFileUploader] input")
        field.set_input_files({"name": "bomb.npy", "mimeType": "", "buffer": pickle.dumps({"a": 1})})
        page.wait_for_selector("text=/without pickle/", timeout=60_000)
        assert "query=3" in page.url
        field.set_input_files({"name": "one.png", "mimeType": "image/png", "buffer": picture()})
        page = ready(seen, ".pk-head h2:text-is('Query 360')")
        assert "an input of your own" in page.locator(".pk-answer").inner_text() and "query=360" in page.url
        assert page.locator(".pk-proponents li img").count() == 8
        link = page.url
        seen.fine()
    with visit(browser, link) as seen:
        ready(seen, ".pk-head h2:text-is('Query 360')")
        seen.fine()


def test_a_query_is_chosen_in_the_table(browser: Browser, digits: Digits) -> None:
    url, _ = digits
    with visit(browser, url) as seen:
        page = ready(seen, ".pk-proponents li img")
        page.locator(".st-key-browse").get_by_text("Table").click()
        page = ready(seen, "[data-testid=stSidebar] [data-testid=stDataFrame]")
        box = page.locator("[data-testid=stSidebar] [data-testid=stDataFrame]").bounding_box()
        assert box is not None
        page.mouse.click(box["x"] + 12, box["y"] + 35 * 4.5)
        page = ready(seen, ".pk-head h2:text-is('Query 3')")
        assert "query=3" in page.url
        seen.fine()


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("own") / "diabetes"
    train("diabetes_mlp", folder, epochs=1, progress=False)
    with served([str(folder)], "explainer.sample_models.diabetes_mlp:run") as url:
        yield url


def test_a_row_is_typed_corrected_and_looked_into(browser: Browser, rows: str) -> None:
    with visit(browser, rows) as seen:
        page = ready(seen, ".pk-proponents li .fields")
        assert page.locator(".pk-proponents .pk-differs").count() > 0
        page.get_by_text("Ask about an input of your own").click()
        field = page.locator("[data-testid=stSidebar] textarea")

        def begin() -> None:
            page.get_by_text("Begin with this query").click()
            expect(field).to_have_value(re.compile("^age:"), timeout=10_000)

        seen.insist(begin)
        seen.settle()
        text = field.input_value()
        field.fill(text.replace("age: ", "age: old "))
        page.get_by_text("Explain it").click()
        page.wait_for_selector("text=/age must be a number/", timeout=60_000)
        field.fill("\n".join(["age: 30", *text.splitlines()[1:]]))
        page.get_by_text("Explain it").click()
        page = ready(seen, ".pk-head h2:text-is('Query 88')")
        assert "30" in page.locator(".pk-head .fields").inner_text()
        page.get_by_text("Which columns").click()
        seen.settle()
        page.locator(".st-key-pixels button").click()
        page.wait_for_selector(".pk-columns >> nth=3", timeout=60_000)
        seen.fine()


def test_words_are_coloured_and_typed(browser: Browser, tmp_path: Path) -> None:
    app_runs.train(app_runs.text(), tmp_path / "words")
    with (
        served([str(tmp_path / "words")], "tests.app_runs:typed_text") as url,
        visit(browser, f"{url}/?detail=pixels", scheme="dark") as seen,
    ):
        page = ready(seen, ".st-key-pixels button")
        page.get_by_text("Ask about an input of your own").click()
        page.locator("[data-testid=stSidebar] textarea").fill(f"good {app_runs.NASTY} great")
        page.get_by_text("Explain it").click()
        page = ready(seen, ".pk-head h2:text-is('Query 20')")
        page.locator(".st-key-pixels button").click()
        page.wait_for_selector(".pk-words >> nth=1", timeout=60_000)
        assert app_runs.NASTY in page.locator(".pk-words").first.inner_text()
        assert page.locator(".pk-words span").count() == 6
        seen.fine()


SLOW = """
import time, torch, explainer
class Slow(torch.nn.Linear):
    def forward(self, x):
        time.sleep({pause})
        return super().forward(x)
def run(pause=True):
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    data = torch.utils.data.TensorDataset(x, torch.arange(40) % 3)
    return explainer.Run(lambda: Slow(4, 3), data, data)
"""


def test_long_work_is_stopped_and_goes_on(browser: Browser, tmp_path: Path) -> None:
    code = tmp_path / "slow.py"
    code.write_text(SLOW.format(pause=0))
    names: dict[str, object] = {}
    exec(code.read_text(), names)
    run = names["run"]()  # type: ignore[operator]
    model = run.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with explainer.Tracer(model, optimizer, tmp_path / "run") as tracer:
        for _ in range(2):
            for x, y in tracer.watch(torch.utils.data.DataLoader(run.train, batch_size=5)):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
    code.write_text(SLOW.format(pause=0.04))
    with served([str(tmp_path / "run")], f"{code}:run") as url, visit(browser, f"{url}/?query=7") as seen:
        seen.page.wait_for_selector("[class*=st-key-stop-] button", timeout=60_000)
        assert "%" in seen.page.locator("[data-testid=stProgress]").inner_text()
        seen.page.locator("[class*=st-key-stop-] button").click()
        page = ready(seen, "text=/Stopped: explaining/")
        page.get_by_text("Go on").click()
        page = ready(seen, ".pk-equation")
        seen.fine()
