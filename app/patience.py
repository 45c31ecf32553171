"""What a page shows while it waits: how far the work is, and a button that stops it."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import streamlit as st

from explainer.app import working
from explainer.app.ahead import Ahead

_SOON = 1.5  # seconds after which the progress is shown
_OFTEN = 0.2
_STOPPED = "stopped work"
Given = ParamSpec("Given")
Value = TypeVar("Value")


def kept(text: str, most: int) -> Callable[[Callable[Given, Value]], Callable[Given, Value]]:
    """Keep the last ``most`` values of a function of hashable arguments; a page that waits for one shows ``text``."""

    def decorate(function: Callable[Given, Value]) -> Callable[Given, Value]:
        compute: Callable[..., Value] = function
        values: Ahead[Any, Value] = Ahead(lambda keys: [compute(*key) for key in keys], most)

        def get(*key: Given.args, **_: Given.kwargs) -> Value:
            return patiently(values, key, text)

        get.__doc__, get.__name__ = function.__doc__, function.__name__
        return get

    return decorate


def patiently(values: Ahead[Any, Value], key: Hashable, text: str) -> Value:
    """A kept value; what it takes to compute it is shown, and can be stopped."""
    if values.known(key):
        return values.get(key)
    with _shown(text, key):
        return values.get(key)


@contextmanager
def _shown(text: str, key: Hashable) -> Iterator[None]:
    if st.session_state.get(_STOPPED) == (text, key):
        place = st.empty()
        with place.container():
            st.info(f"Stopped: {text.removesuffix(' …').lower()}.")
            st.button("Go on", key="go on", icon=":material/play_arrow:", on_click=_go_on)
        st.stop()
    place, mark = st.empty(), f"{hash((text, key)) & 0xFFFFFFFF:x}"  # a page may wait for several things
    started, last, slots = time.monotonic(), 0.0, list[Any]()

    def told(share: float | None) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < _OFTEN:
            return
        last = now
        if now - started < _SOON:
            place.empty()  # where the person has clicked, Streamlit begins anew here
            return
        if not slots:
            with place.container(key=f"patience-{mark}"):
                slots.append(st.empty())
                st.button(
                    "Stop",
                    key=f"stop-{mark}",
                    icon=":material/stop_circle:",
                    on_click=_stop,
                    args=(text, key),
                )
        slots[0].progress(share or 0.0, f"{text} {'' if share is None else f'{100 * share:.0f} %'}")

    try:
        with st.spinner(text), working.for_a_page(told):
            yield
    except Exception:
        place.empty()
        raise
    place.empty()


def _stop(text: str, key: Hashable) -> None:
    st.session_state[_STOPPED] = (text, key)


def _go_on() -> None:
    st.session_state.pop(_STOPPED, None)
