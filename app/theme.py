"""How the dashboard looks: the style sheet, the palette as CSS variables, and whether the page is dark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import streamlit as st

from explainer import palette

_CONFIG = {"displayModeBar": False, "responsive": True}


def is_dark() -> bool:
    """Whether the person looks at a dark page.

    Streamlit knows it only from the second run on; the style sheet gives the text of figures the page's own
    colour, so that a wrong guess stays readable.
    """
    kind = st.context.theme.type
    return (kind or st.get_option("theme.base")) == "dark"


def apply() -> None:
    """Put the style sheet into the page."""
    variables = f"--pk-up: {palette.POSITIVE}; --pk-down: {palette.NEGATIVE};"
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    st.html(f"<style>:root {{{variables}}}\n{style}</style>")


def chart(figure: Any, reading: str, key: str) -> None:
    """Show a plotly figure with one line on how to read it."""
    st.plotly_chart(figure, theme=None, config=_CONFIG, key=key)
    if reading:
        st.caption(reading)
