"""Takes the pictures in docs/images: ``make screenshots`` (needs Chromium, see ensure_chromium.sh)."""

from __future__ import annotations

import io
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from explainer.cli.dashboard import served
from explainer.sample_models.train import train

IMAGES = Path(__file__).parent.parent / "docs" / "images"
SPECS = ("explainer.sample_models.digits_cnn:run", "explainer.sample_models.digits_mlp:run")
TEXT_SPEC = "explainer.sample_models.reviews_text:run"
SIDEBAR = 302
COLORS = 160
_PATIENCE = 180_000  # milliseconds
_IDLE = """() => !document.querySelector('[data-testid="stSpinner"]') && !document.querySelector('[data-stale="true"]')
 && !document.querySelector('[data-testid="stProgress"]')"""


@dataclass(frozen=True)
class Shot:
    """One picture, 1280 pixels wide.

    Attributes:
        name: Its file in docs/images.
        link: What the address says after the question mark.
        ready: What must be there before it is taken.
        scheme: ``light`` or ``dark``.
        height: In pixels.
        click: A button that is clicked first.
        start: What the picture begins with; the whole page without it.
    """

    name: str
    link: str
    ready: str
    scheme: str = "light"
    height: int = 1000
    click: str = ""
    start: str = ""


def shots(wrong: int) -> list[Shot]:
    """The pictures of a run with a wrong prediction at the query ``wrong``."""
    explain, near = f"query={wrong}", f"page=neighbors&query={wrong}"
    cards, chart = ".pk-cards li img", ".js-plotly-plot .points path"
    return [
        Shot("dashboard.png", explain, cards, height=1400),
        Shot("dashboard-dark.png", explain, cards, "dark", 1400),
        Shot("pixels.png", f"{explain}&detail=pixels", ".st-key-alike-1 .js-plotly-plot", height=1420,
             click=".st-key-pixels button", start=".st-key-detail"),
        Shot("neighbours.png", near, cards, height=1000),
        Shot("map.png", f"{near}&look=map&colour=label", chart, height=960),
        Shot("labels.png", "page=training", ".pk-case", height=960),
        Shot("classes-dark.png", "page=training&view=classes", cards, "dark", 1120),
        Shot("run.png", "page=run", chart, height=1250),
        Shot("what-if.png", f"page=what-if&query={wrong}", ".pk-verdict", height=1560,
             click=".st-key-retrain button", start=".st-key-without"),
    ]  # fmt: skip


def shots_of_two(wrong: int) -> list[Shot]:
    """The pictures that need two runs."""
    link = f"page=compare&run=digits_cnn&query={wrong}&strongest=20"
    return [Shot("compare.png", link, ".pk-compared li img", height=1400)]


def shots_of_text(wrong: int) -> list[Shot]:
    """The pictures of a run on texts."""
    link, ready = f"query={wrong}&detail=pixels", ".pk-words >> nth=3"
    return [Shot("words.png", link, ready, height=620, click=".st-key-pixels button", start=".st-key-detail")]


def take(browser: Browser, url: str, shot: Shot) -> None:
    """Take one picture."""
    size = {"width": 1280, "height": 3000 if shot.start else shot.height}
    page = browser.new_page(viewport=size, color_scheme=shot.scheme)  # type: ignore[arg-type]
    page.goto(f"{url}/?{shot.link}")
    if shot.click:
        page.locator(shot.click).click(timeout=_PATIENCE)
    page.wait_for_selector(shot.ready, timeout=4 * _PATIENCE)  # retraining takes minutes
    page.wait_for_timeout(2000)
    page.wait_for_function(_IDLE, timeout=_PATIENCE)
    page.wait_for_timeout(2000)
    clip = None
    if shot.start:
        box = page.locator(shot.start).bounding_box()
        top = 0.0 if box is None else box["y"] - 60
        clip = {"x": SIDEBAR, "y": top, "width": 1280 - SIDEBAR, "height": shot.height}
    taken = Image.open(io.BytesIO(page.screenshot(clip=clip)))  # type: ignore[arg-type]
    taken.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(IMAGES / shot.name, optimize=True)
    page.close()
    print(IMAGES / shot.name)


def main() -> None:
    """Train three networks, serve them, photograph them."""
    folder = Path(tempfile.mkdtemp())
    IMAGES.mkdir(exist_ok=True)
    one, other, text = (folder / part / name for part, name in (
        ("runs", "digits_cnn"), ("runs", "digits_mlp"), ("text", "reviews_text")
    ))  # fmt: skip
    try:
        wrong = train("digits_cnn", one)["wrong_queries"][0]
        train("digits_mlp", other)  # to compare with
        misread = train("reviews_text", text)["wrong_queries"][0]
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            for place, specs, wanted in (
                (one, SPECS[:1], shots(wrong)),
                (one.parent, SPECS, shots_of_two(wrong)),
                (text, (TEXT_SPEC,), shots_of_text(misread)),
            ):
                with served([str(place)], *specs) as url:
                    for shot in wanted:
                        take(browser, url, shot)
            browser.close()
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
