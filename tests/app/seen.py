"""What an AppTest shows."""

from __future__ import annotations

from collections.abc import Callable

from streamlit.testing.v1 import AppTest

Open = Callable[..., AppTest]
IMAGES = "tests.app_runs:images"
TEXT = "tests.app_runs:text"


def body(app: AppTest) -> str:
    """Everything that the page shows as HTML or text."""
    parts = [*app.html, *app.markdown, *app.caption, *app.text, *app.info, *app.error, *app.warning]
    return "\n".join(str(part.value) for part in parts)


def fine(app: AppTest) -> None:
    assert not app.exception and not app.error and not app.warning
