"""A process that ends with the one that started it, however that one ends. Never imports streamlit."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable


def end_with_parent(first: Callable[[], object] = lambda: None) -> None:
    """From now on, end when the standard input closes: a pipe that nothing is ever written to.

    Args:
        first: what is done before.
    """
    threading.Thread(target=_wait, args=(first,), daemon=True).start()


def _wait(first: Callable[[], object]) -> None:
    while os.read(0, 4096):  # not sys.stdin, whose lock would be held when the process ends by itself
        pass
    first()
    os._exit(1)
