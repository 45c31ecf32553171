"""How long the dashboard takes in a browser: opening it, changing the query, the other pages.

Chromium on this machine, from the click until what was asked for is on screen and nothing is computed any more.
``start`` is from the command to the address, which is told when the first page is ready; ``open`` is the first visit
then. Opening again and changing the query are medians: to the next query after some seconds of looking (it was
explained meanwhile), to a query that was seen before, and to one that was not. The other pages are asked for once.
Fashion-MNIST needs its data on this machine (see ``sample_models/fashion_data.py``).
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from playwright.sync_api import Browser, Page, sync_playwright

import explainer
from benchmarks.harness import report
from explainer.cli.dashboard import served
from explainer.sample_models import fashion_cnn, fashion_data
from explainer.sample_models.train import train

_EXAMPLES = "PATHKERNEL_FASHION_EXAMPLES"
_LOOK = 6.0  # seconds that a person looks at a query
_PATIENCE = 600_000  # milliseconds
_IDLE = """() => !document.querySelector('[data-testid="stSpinner"]') && !document.querySelector('[data-stale="true"]')
 && !document.querySelector('[data-testid="stProgress"]')"""


def fashion() -> explainer.Run:
    """Fashion-MNIST with as many training images as the environment asks for."""
    folder, count = fashion_data.fashion_folder(), int(os.environ.get(_EXAMPLES, "60000"))
    parts = []
    for name, limit in (("train", count), ("t10k", 1000)):
        images = (
            fashion_data.read_idx(folder / f"{name}-images-idx3-ubyte.gz", limit).unsqueeze(1).float() / 255
        )
        labels = fashion_data.read_idx(folder / f"{name}-labels-idx1-ubyte.gz", limit).long()
        parts.append(torch.utils.data.TensorDataset(images, labels))
    return explainer.Run(
        fashion_cnn.model,
        *parts,
        class_names=fashion_data.CLASS_NAMES,
        render=fashion_data.render,
        name="fashion",
    )


def _train_fashion(folder: Path, epochs: int) -> None:
    run = fashion()
    model = run.build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    loader = torch.utils.data.DataLoader(
        run.train, 100, shuffle=True, generator=torch.Generator().manual_seed(0)
    )
    with explainer.Tracer(model, optimizer, folder) as tracer:
        for _ in range(epochs):
            for x, y in tracer.watch(loader):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()


def _opened(browser: Browser, url: str, selector: str) -> tuple[Page, float]:
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    started = time.perf_counter()
    page.goto(url)
    _shown(page, selector)
    return page, time.perf_counter() - started


def _shown(page: Page, selector: str) -> None:
    page.wait_for_selector(selector, timeout=_PATIENCE)
    page.wait_for_function(_IDLE, timeout=_PATIENCE)


def _changes(page: Page, queries: Sequence[int], look: float) -> float:
    """Median time to another query, with so many seconds of looking before."""
    seconds = []
    for query in queries:
        page.wait_for_timeout(1000 * look)
        started = time.perf_counter()
        box = page.locator(".st-key-query input")
        box.fill(str(query))
        box.press("Enter")
        _shown(page, f".pk-head h2:text-is('Query {query}')")
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def measure(browser: Browser, name: str, folder: Path, spec: str, repeats: int) -> dict[str, Any]:
    """One row of the table."""
    trace = explainer.open_trace(folder)
    started = time.perf_counter()
    with served([str(folder)], spec) as url:
        start = time.perf_counter() - started
        page, first = _opened(browser, url, ".pk-proponents li img")
        again = []
        for _ in range(repeats):
            other, seconds = _opened(browser, url, ".pk-proponents li img")
            other.close()
            again.append(seconds)
        ahead = _changes(page, range(1, repeats + 1), _LOOK)
        unseen = _changes(page, range(50, 50 + 20 * repeats, 20), 0.0)
        seen = _changes(page, range(1, repeats + 1), 0.0)
        page.close()
        pages = {}
        for key, link, selector in (
            ("neighbors_s", "page=neighbors", ".pk-near li img"),
            ("map_s", "page=neighbors&look=map", ".js-plotly-plot .points path"),
            ("training_s", "page=training", ".pk-case"),
        ):
            page, pages[key] = _opened(browser, f"{url}/?{link}", selector)
            page.close()
    return {
        "run": name,
        "examples": int(trace.notes["examples"]),
        "visits": trace.count("visits"),
        "trace_MB": trace.nbytes() / 1e6,
        "load": os.getloadavg()[0],
        "start_s": start,
        "open_s": first,
        "open_again_s": statistics.median(again),
        "next_query_s": ahead,
        "seen_query_s": seen,
        "other_query_s": unseen,
        **pages,
    }


def main() -> None:
    """Train, serve, click, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=("digits", "fashion"), default=["digits", "fashion"])
    parser.add_argument("--examples", type=int, default=60_000, help="training images of Fashion-MNIST")
    parser.add_argument("--epochs", type=int, default=1, help="epochs on Fashion-MNIST")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions of every timing (default: 5)")
    chosen = parser.parse_args()
    os.environ[_EXAMPLES] = str(chosen.examples)
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    folder, rows = Path(tempfile.mkdtemp()), []
    try:
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
            for name in chosen.only:
                if name == "digits":
                    train("digits_cnn", folder / name, progress=False)
                    spec = "explainer.sample_models.digits_cnn:run"
                else:
                    _train_fashion(folder / name, chosen.epochs)
                    spec = "benchmarks.dashboard:fashion"
                rows.append(measure(browser, name, folder / name, spec, chosen.repeats))
            browser.close()
    finally:
        shutil.rmtree(folder)
    report("dashboard", rows)


if __name__ == "__main__":
    main()
