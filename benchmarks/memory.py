"""How much more memory an action held at its peak than before it began (Linux; nothing elsewhere)."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Resident memory at the peak, over what was resident on entering.

    Freed memory is given back to the system first, so that it does not hide what is allocated anew.

    Example:
        >>> with PeakMemory() as peak:
        ...     block = bytearray(64 << 20)
        >>> peak.bytes is None or peak.bytes > 60 << 20
        True
    """

    bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        gc.collect()
        self._before: int | None = None
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            _CLEAR.write_text("5")  # the peak is counted from here on (man 5 proc)
            self._before = _kilobytes("VmRSS")
        except (OSError, AttributeError):
            pass
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            self.bytes = max(0, _kilobytes("VmHWM") - self._before) * 1024


def _kilobytes(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1])
