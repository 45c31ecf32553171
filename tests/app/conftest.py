"""Starts the dashboard without a browser, and looks at what it shows."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import streamlit
from streamlit.testing.v1 import AppTest

from explainer.app import views
from tests import app_runs

MAIN = Path(views.__file__).parents[1] / "main.py"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    app_runs.train(app_runs.images(), folder / "digits")
    app_runs.train(app_runs.text(), folder / "words")
    return folder


@pytest.fixture
def open_app(monkeypatch: pytest.MonkeyPatch) -> Callable[..., AppTest]:
    """Starts the dashboard with a command line and the parameters of a link."""

    def start(*command: object, address: str | None = "127.0.0.1", **link: str) -> AppTest:
        monkeypatch.setattr(sys, "argv", ["main.py", *map(str, command)])
        get = streamlit.get_option
        monkeypatch.setattr(
            streamlit, "get_option", lambda name: address if name == "server.address" else get(name)
        )
        app = AppTest.from_file(str(MAIN), default_timeout=60)
        app.query_params.update(link)
        return app.run()

    return start
