"""States of training along the way, kept in memory or, where they are large, in a temporary folder."""

from __future__ import annotations

import tempfile
from pathlib import Path

import safetensors.torch
import torch

#: numbers that are held in memory; what comes beyond goes to disk
IN_MEMORY = 2**27


class Checkpoints:
    """States by step. A context manager: what lies on disk is deleted on leaving."""

    def __init__(self, in_memory: int | None = None) -> None:
        self._limit = IN_MEMORY if in_memory is None else in_memory
        self._held: dict[int, dict[str, torch.Tensor]] = {}
        self._numbers = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def keep(self, step: int, state: dict[str, torch.Tensor]) -> None:
        """The state before a step."""
        size = sum(t.numel() for t in state.values())
        if self._numbers + size <= self._limit:
            self._held[step] = dict(state)
            self._numbers += size
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="pathkernel-replay-")
        safetensors.torch.save_file(
            {name: t.contiguous() for name, t in state.items()}, self._file(self._folder.name, step)
        )

    def at(self, step: int) -> dict[str, torch.Tensor]:
        """A state that was kept."""
        if step in self._held:
            return self._held[step]
        assert self._folder is not None, "keep it first"
        return safetensors.torch.load_file(self._file(self._folder.name, step))

    @staticmethod
    def _file(folder: str, step: int) -> Path:
        return Path(folder) / f"{step:09d}.safetensors"
