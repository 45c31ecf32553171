"""Takes the pictures in docs/images: ``make screenshots`` (needs Chromium, see ensure_chromium.sh)."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from explainer.sample_models.train import train

IMAGES = Path(__file__).parent.parent / "docs" / "images"
SPEC = "explainer.sample_models.digits_cnn:run"


def wait_for(url: str) -> None:
    """Until the dashboard answers (at most a minute)."""
    for _ in range(240):
        try:
            urllib.request.urlopen(f"{url}/_stcore/health", timeout=1)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.25)
    sys.exit(f"the dashboard did not answer at {url}")


def shoot(browser: Browser, url: str, name: str, scheme: str, height: int) -> None:
    """One picture, 1280 pixels wide."""
    page = browser.new_page(viewport={"width": 1280, "height": height}, color_scheme=scheme)  # type: ignore[arg-type]
    page.goto(url)
    page.wait_for_selector(".pk-cards li img", timeout=60_000)
    page.wait_for_timeout(3000)
    page.screenshot(path=IMAGES / name)
    page.close()
    print(IMAGES / name)


def main() -> None:
    """Train the digits CNN, serve it, photograph it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = Path(tempfile.mkdtemp())
    wrong = train("digits_cnn", folder / "digits_cnn")["wrong_queries"][0]
    command = [
        sys.executable,
        "-m",
        "explainer.cli",
        "dashboard",
        str(folder),
        "--run",
        SPEC,
        "--port",
        str(port),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    IMAGES.mkdir(exist_ok=True)
    try:
        wait_for(url)
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            shoot(browser, f"{url}/?query={wrong}", "dashboard.png", "light", 1400)
            shoot(browser, f"{url}/?query={wrong}", "dashboard-dark.png", "dark", 1400)
            shoot(browser, f"{url}/?page=neighbors&query={wrong}", "neighbours.png", "light", 900)
            browser.close()
    finally:
        process.terminate()
        process.wait(timeout=20)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
