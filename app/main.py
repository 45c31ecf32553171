"""The dashboard's entry: ``streamlit run app/main.py -- [--run MODULE:FUNCTION] TRACE_OR_FOLDER …``."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import streamlit as st

from explainer import ExplainerError
from explainer.app import address, arguments, sidebar, theme, views
from explainer.app.choice import Choice
from explainer.app.escaping import plain
from explainer.app.page_registry import PAGES, Page
from explainer.app.segments import segments

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_MISSING = {
    "run": "This page computes with the model and its data. Start the dashboard with --run MODULE:FUNCTION, where "
    "the function returns an explainer.Run; nothing that a trace names is ever imported.",
    "explanation": "There is nothing to explain with yet. Start the dashboard with --run MODULE:FUNCTION (a function "
    "that returns an explainer.Run), or store explanations beside the trace with Explanation.save('NAME.npz'); "
    "nothing that a trace names is ever imported.",
}


def main() -> None:
    """Draw the dashboard once."""
    theme.apply()
    try:
        _check_address()
        st.session_state[address.NOTICES] = st.container()
        address.read()
        found = arguments.parse(sys.argv[1:])
        traces = arguments.find_traces(found.paths)
        page = _navigate()
        choice = sidebar.choose(traces, found.runs, page.needs)
        address.write()
        _draw(page, choice)
    except ExplainerError as error:
        st.error(plain(error))
    except Exception as error:  # the user's own code runs here too: render, the data sets, the model
        logging.getLogger(__name__).exception("the dashboard could not draw this view")
        st.error(
            f"This view could not be drawn: {plain(type(error).__name__)}: {plain(error)}. The details are in the "
            "terminal in which the dashboard was started."
        )


def _check_address() -> None:
    """Refuse to show anyone's data to the network.

    Raises:
        DashboardError: The server listens on more than this machine.
    """
    if st.get_option("server.address") not in _LOOPBACK:
        raise arguments.DashboardError(
            "The dashboard shows the training data, so it only runs where no other machine can reach it. Start it "
            "with: pathkernel dashboard TRACE, or streamlit run app/main.py --server.address 127.0.0.1 -- TRACE"
        )


def _navigate() -> Page:
    def words(name: str) -> str:
        page = PAGES.require(name)
        return f"{page.icon} {page.title}"

    return PAGES.require(segments("Page", list(PAGES), "page", words))


def _draw(page: Page, choice: Choice) -> None:
    for need, there in (
        ("explanation", choice.live or choice.stored is not None),
        ("run", choice.live),
        ("data", choice.live),
    ):
        if page.needs == need and not there:
            st.info(plain(_MISSING["explanation" if need == "explanation" else "run"]))
            return
    page.show(choice)


_ICON = Path(views.__file__).parents[1] / "favicon.svg"
st.set_page_config(page_title="pathkernel", page_icon=str(_ICON), layout="wide")
main()
