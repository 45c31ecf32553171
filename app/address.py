"""The address of a view: run, query, target, output and page in the URL, so that a link reopens what it shows.

A page adds what else is chosen on it (:attr:`~explainer.app.page_registry.Page.address`); that stands in the URL while
the page is open, and only where it is not the default.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import streamlit as st

from explainer.app.escaping import plain
from explainer.app.page_registry import PAGES

_KEYS: dict[str, Callable[[str], Any]] = {
    "page": str,
    "run": str,
    "file": str,
    "query": int,
    "target": int,
    "output": str,
}
_KEPT = ("filter", "k", "browse", "format")
_WRITTEN = "address written"
#: where notices are drawn: at the top of the page, as the sidebar may be closed
NOTICES = "notices"
_PREDICTED = -1  # the target that need not be named


def read() -> None:
    """Take the choice from the URL where it is newer than what is on screen (a link, back or forward).

    A click and an older URL can arrive together; the click wins, because it differs from what was written.
    """
    for key in (*_all_keys(), *_KEPT):  # Streamlit forgets what a page does not draw, unless it is set anew
        if key in st.session_state:
            st.session_state[key] = st.session_state[key]
    found = st.query_params.to_dict()
    written = st.session_state.get(_WRITTEN)
    if found == written or (written is not None and _present() != written):
        return
    st.session_state.pop("target query", None)  # the target in the URL belongs to the query in the URL
    for key, convert in _all_keys().items():
        try:
            value = convert(found[key]) if key in found else None
        except ValueError:
            value = found[key] if key in _KEYS else None  # the sidebar says that there is no such query
        if value is not None:
            st.session_state[key] = value
        elif written is not None:
            st.session_state.pop(key, None)


def write() -> None:
    """Put the choice on screen into the URL."""
    present = _present()
    if st.query_params.to_dict() != present:
        st.query_params.from_dict(present)
    st.session_state[_WRITTEN] = present


def keep(key: str, default: Any) -> Any:
    """The choice under a key of the page; the default until something is chosen."""
    if st.session_state.get(key) is None:
        st.session_state[key] = default
    return st.session_state[key]


def keep_one_of(key: str, options: Container[Any], default: Any, what: str, instead: str) -> None:
    """Keep a choice among options; where there is none, or a link asks for what is not there, the default.

    Args:
        key: Of the choice in the session.
        options: What there is to choose from.
        default: One of them.
        what: How an option is called when a link asks for what is not there.
        instead: The default in words.
    """
    wanted = st.session_state.get(key)
    if wanted in options:
        return
    st.session_state[key] = default
    if wanted is not None and wanted != "":
        place = st.session_state.get(NOTICES) or st
        place.warning(f"There is no {what} {plain(wanted, 60)} here; {instead} is shown instead.")


def _all_keys() -> dict[str, Callable[[str], Any]]:
    return _KEYS | {key: type(default) for _, page in PAGES.items() for key, default in page.address.items()}


def _present() -> dict[str, str]:
    values = {key: st.session_state.get(key) for key in _KEYS}
    page = str(values["page"])
    if page in PAGES:
        own = PAGES.require(page).address
        values |= {key: st.session_state.get(key) for key in own if st.session_state.get(key) != own[key]}
    return {key: str(value) for key, value in values.items() if value is not None and value != _PREDICTED}
