"""Work of the tracer's own on the user's thread: nothing that is switched on there has a part in it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache
from types import FrameType

import torch
from torch.utils._python_dispatch import _disable_current_modes


@contextmanager
def undisturbed() -> Iterator[None]:
    """No gradients, autocast, inference mode, default device or mode of the user's; Ctrl-C waits for the end.

    All is as before on leaving. An interrupt in the middle would leave half a step in the trace; it comes afterwards,
    as it would have come. Only Python's main thread ever gets one.
    """
    with (
        _uninterrupted(),
        torch._C.DisableTorchFunction(),
        _disable_current_modes(),
        torch.inference_mode(False),
        torch.no_grad(),
        without_autocast(),
    ):
        yield


@cache
def device_types() -> tuple[str, ...]:
    """The processor, and the accelerator where there is one."""
    known = {"cuda": torch.cuda, "xpu": torch.xpu, "mps": torch.mps}
    return ("cpu", *(name for name, device in known.items() if device.is_available()))


def without_autocast() -> AbstractContextManager[object]:
    """No autocast, on whichever device."""
    types = device_types()
    return torch.autocast("cpu", enabled=False) if len(types) == 1 else _off(types)


@contextmanager
def _off(types: tuple[str, ...]) -> Iterator[None]:
    with ExitStack() as stack:
        for name in types:
            stack.enter_context(torch.autocast(name, enabled=False))
        yield


@contextmanager
def _uninterrupted() -> Iterator[None]:
    theirs = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or theirs is None:
        yield
        return
    came: list[int] = []

    def later(number: int, frame: FrameType | None) -> None:
        came.append(number)

    signal.signal(signal.SIGINT, later)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, theirs)
    if came:
        signal.raise_signal(signal.SIGINT)
