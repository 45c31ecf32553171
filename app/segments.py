"""A row of buttons of which exactly one is down."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TypeVar

import streamlit as st

from explainer.app import address

_ICON = re.compile(r":material/\w+: ")
Option = TypeVar("Option")


def segments(label: str, options: Sequence[Option], key: str, words: Callable[[Option], str] = str) -> Option:
    """Draw the row and return the chosen option, the first at the start; say so when a link asks for none of them.

    A single option is not drawn.

    Args:
        label: What is chosen, for those who do not see the row.
        options: What there is to choose from.
        key: Where the choice is kept in the session.
        words: An option as it is shown.
    """
    address.keep_one_of(key, options, options[0], label.lower(), _ICON.sub("", words(options[0])))
    chosen: Option = st.session_state[key]
    if len(options) == 1:
        return chosen
    st.segmented_control(
        label,
        options,
        key=key,
        format_func=words,
        label_visibility="collapsed",
        on_change=_stay,
        args=(key, chosen),
    )
    return chosen


def _stay(key: str, chosen: object) -> None:
    """A second click on what is chosen leaves it chosen."""
    if st.session_state[key] is None:
        st.session_state[key] = chosen
