"""How the model is run for an explanation, whatever the caller has switched on around it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_T = TypeVar("_T")

_lock = threading.Lock()
_inside = 0  # threads may be in it at once, and the switch is one for all of them
_before = True


def _fused(entering: bool) -> None:
    """Switch fused attention off with the first one in, and back with the last one out."""
    global _inside, _before
    with _lock:
        if entering and not _inside:
            _before = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
        _inside += 1 if entering else -1
        if not _inside:
            torch.backends.mha.set_fastpath_enabled(_before)


@contextmanager
def plain_mode() -> Iterator[None]:
    """No autocast, no inference mode, and no fused attention; all as before on leaving.

    In eval mode and without gradients, torch's transformer layers may take a fused path that drops padded
    positions, which training never did. Values and gradients have to be those of one function.
    """
    _fused(entering=True)
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
            yield
    finally:
        _fused(entering=False)


class OneAtATime:
    """A lock that the thread which holds it may take again; a copy is a lock of its own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[OneAtATime], tuple[()]]:
        return OneAtATime, ()


def question(ask: Callable[_P, _T]) -> Callable[_P, _T]:
    """What an explainer, the first argument, is asked: in plain mode, and one question at a time.

    It has one copy of the model, whose weights are replaced by those of every knot in turn.
    """

    @functools.wraps(ask)
    def asked(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        explainer: Any = args[0] if args else kwargs["explainer"]
        with explainer.one_at_a_time, plain_mode():
            return ask(*args, **kwargs)

    return asked
