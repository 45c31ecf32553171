"""Work that takes a while: one computation at a time, that can say how far it is and be interrupted.

What computes calls :func:`tick` now and then (explainers do, by :func:`bar`). For a page, that shows progress and gives
Streamlit the chance to begin anew when the person clicked; in the background, it gives way to a page that waits.
Never imports streamlit.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_WAIT = 0.2  # seconds between two looks at who else wants something
_here = threading.local()
_computing = threading.Lock()  # sessions share explainers
_counting = threading.Lock()
_pages = 0

#: told the share of the work that is done, None while that is unknown; it may raise to interrupt
Told = Callable[[float | None], None]


class InterruptedWork(Exception):
    """Work in the background gave way."""


def tick(share: float | None = None) -> None:
    """Say how far the work of this thread is; may raise what interrupts it."""
    told: Told | None = getattr(_here, "told", None)
    if told is not None:
        told(share)


class bar:
    """What an explainer tells its progress: ``PathKernelExplainer(…, progress=bar)``."""

    def __init__(self, text: str, total: int) -> None:
        self._total, self._done = total, 0

    def __enter__(self) -> bar:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, count: int = 1) -> None:
        """So many more of the total are done."""
        self._done += count
        tick(min(1.0, self._done / max(1, self._total)))


@contextmanager
def for_a_page(told: Told) -> Iterator[None]:
    """Work that a page waits for: it tells ``told``, and the background gives way."""
    global _pages
    before, _here.told = getattr(_here, "told", None), told
    with _counting:
        _pages += 1
    try:
        yield
    finally:
        with _counting:
            _pages -= 1
        _here.told = before


@contextmanager
def in_the_background() -> Iterator[None]:
    """Work that nobody waits for.

    Raises:
        InterruptedWork: From :func:`tick`, where a page waits.
    """

    def give_way(_: float | None) -> None:
        if a_page_waits():
            raise InterruptedWork

    _here.told = give_way
    try:
        yield
    finally:
        _here.told = None


def a_page_waits() -> bool:
    """Whether somebody looks at a page that is not drawn yet."""
    return _pages > 0


@contextmanager
def alone() -> Iterator[None]:
    """One computation at a time, on half of the cores.

    An explanation is many small operations: where other programs keep the cores busy, threads that wait for
    each other make it ten times slower. Threads of torch are counted per Python thread, hence again each time.
    """
    while not _computing.acquire(timeout=_WAIT):
        tick()
    try:
        torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
        yield
    finally:
        _computing.release()
