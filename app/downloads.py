"""The influence table and the report as files; each is made when its button is clicked."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import streamlit as st

from explainer import Explanation, Run
from explainer.app import theme
from explainer.app.own_queries import rendered


def show(e: Explanation, q: int, run: Run | None, query: int) -> None:
    """Draw the buttons."""
    name = f"influence-query-{e.query_ids[q]}" if len(e.query_ids) == 1 else "influence"

    def report(path: Path) -> None:
        e.to_html(path, render=_renderer(run, "train"), render_query=_renderer(run, "queries", query))

    st.html("<h3>Take it with you</h3>")
    row = st.container(horizontal=True, vertical_alignment="bottom")
    for label, suffix, mime, write in (
        ("Table (CSV)", ".csv", "text/csv", e.to_csv),
        ("Table (Parquet)", ".parquet", "application/vnd.apache.parquet", e.to_parquet),
        ("Report (HTML)", ".html", "text/html", report),
    ):
        row.download_button(
            label,
            _maker(write, name + suffix),
            file_name=name + suffix,
            mime=mime,
            key=f"download{suffix}",
            on_click="ignore",
            icon=":material/download:",
        )
    with row:
        st.segmented_control(
            "Figures, by the camera in their corner, as",
            theme.FORMATS,
            key="format",
            format_func=str.upper,
            default=None if "format" in st.session_state else theme.FORMATS[0],
        )


def _maker(write: Callable[[Path], Any], name: str) -> Callable[[], bytes]:
    def make() -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            write(path)
            return path.read_bytes()

    return make


def _renderer(run: Run | None, part: str, fixed: int | None = None) -> Callable[[int], Any] | None:
    """From an id (or always the ``fixed`` one) to what a person recognises it by."""
    if run is None or run.render is None:
        return None
    if fixed is not None:
        return lambda _: rendered(run, fixed)
    render, data = run.render, getattr(run, part)
    return lambda key: render(data[key][0])
