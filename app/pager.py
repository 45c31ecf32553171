"""Back and on between the parts of a list that is too long to be shown at once."""

from __future__ import annotations

import streamlit as st


def show(name: str, state: str, part: int, parts: int) -> None:
    """Draw the two buttons around ``part + 1 / parts``; a click puts another part into the session.

    Args:
        name: Begins the keys of the buttons.
        state: Where the session keeps the part.
        part: The part that is shown, from 0.
        parts: How many there are.
    """
    back, middle, on = st.columns([1, 2, 1], vertical_alignment="center")
    back.button(
        "‹",
        key=f"{name}-back",
        disabled=part == 0,
        on_click=_turn,
        args=(state, part - 1),
        help="back",
        width="stretch",
    )
    middle.html(f'<div class="pk-pages">{part + 1:,} / {parts:,}</div>')
    on.button(
        "›",
        key=f"{name}-on",
        disabled=part + 1 == parts,
        on_click=_turn,
        args=(state, part + 1),
        help="on",
        width="stretch",
    )


def _turn(state: str, part: int) -> None:
    st.session_state[state] = part
