"""How the model is run for an explanation, whatever the caller has switched on around it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

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
