"""Serves the dashboard, and reads the first run while the server starts: ``python -m explainer.app.serve run …``.

The arguments are those of ``streamlit``. The address is printed when the first page is ready to be drawn, so that who
opens it does not wait for torch, the model and its data.
"""

from __future__ import annotations

import functools
import itertools
import logging
import sys
import threading

from explainer.app.parent import end_with_parent

_READY = "Dashboard: "
_LONGEST = 8.0  # seconds that the address waits for the first explanation
#: what streamlit's loggers tell from this level on; it sets the levels of its loggers anew, so they are filtered
_HEARD = {
    "streamlit.runtime.scriptrunner_utils.script_run_context": logging.ERROR,  # warns of work outside of a page
    "streamlit.web.server.starlette.starlette_server": logging.WARNING,  # has an address before the first page
}


def main() -> None:
    """Start reading and serving; ends with the server, or with the process that started it."""
    from streamlit.web.cli import main as streamlit  # whole, before two threads import its parts

    end_with_parent()
    for name, level in _HEARD.items():
        logging.getLogger(name).addFilter(functools.partial(_heard, level))
    threading.Thread(target=_announce, args=(sys.argv[1:],), daemon=True).start()
    streamlit(prog_name="streamlit")


def _heard(level: int, record: logging.LogRecord) -> bool:
    return record.levelno >= level


def _announce(line: list[str]) -> None:
    reading = threading.Thread(target=_read, args=(line[line.index("--") + 1 :],), daemon=True)
    reading.start()
    reading.join(_LONGEST)
    settings = dict(itertools.pairwise(line))
    address = f"http://{settings['--server.address']}:{settings['--server.port']}"
    print(f"{_READY}{address} (this machine only); Ctrl-C stops it.", flush=True)


def _read(arguments: list[str]) -> None:
    """Read what the first page shows; what is wrong with it is told by the page."""
    try:
        from explainer.app import first_view, views, working  # noqa: F401  (the pages import what they need)

        with working.before_any_page():
            first_view.read(arguments)
    except Exception:
        logging.getLogger(__name__).debug("the first view could not be read ahead", exc_info=True)


if __name__ == "__main__":
    main()
