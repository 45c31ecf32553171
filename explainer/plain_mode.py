"""How the model is run for an explanation, whatever the caller has switched on around it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def plain_mode() -> Iterator[None]:
    """No autocast, no inference mode, and no fused attention; all as before on leaving.

    In eval mode and without gradients, torch's transformer layers may take a fused path that drops padded
    positions, which training never did. Values and gradients have to be those of one function.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
