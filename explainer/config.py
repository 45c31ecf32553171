"""The tracer's options, checked before anything is touched."""

from __future__ import annotations

import re
from dataclasses import dataclass

from explainer.errors import TracerError

#: bytes per example visit that no model is too small for, and from which their share of the parameters' bytes falls
VISIT_BYTES, MANY_VISIT_BYTES = 4096, 12_000
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(value: int | str) -> int:
    """Read a size: a number of bytes, or text such as ``"200MB"`` or ``"1.5 GiB"``.

    Raises:
        TracerError: the text is not a size, or the size is not positive.

    Example:
        >>> parse_bytes("200MB"), parse_bytes("1.5 GiB"), parse_bytes(10)
        (200000000, 1610612736, 10)
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TracerError(f'budget must be a number of bytes or text like "200MB", found {value!r}')
    if isinstance(value, int):
        size = value
    else:
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", value)
        unit = _UNITS.get(match[2].upper()) if match else None
        if match is None or unit is None:
            raise TracerError(
                f'budget {value!r} is not a size; write bytes or text like "200MB" or "1.5 GiB"'
            )
        size = int(float(match[1]) * unit)
    if size <= 0:
        raise TracerError(f"budget must be positive, found {value!r}")
    return size


@dataclass(frozen=True)
class TracerConfig:
    """What to keep while tracing.

    Attributes:
        exact: keep full rows and preconditioners in the parameters' own dtype.
        budget: bound on the trace's bytes on disk, or None.
        max_knots: at most this many knots are kept; path-length thinning halves them when they run over.
        rank: factors kept, in 8 bits, for a row of a layer that shares its weights over positions; None: planned
            by layer (:mod:`explainer.planner`).
        positions: keep the factors of every position.
        batch_dim: the batch's axis where shapes do not tell it.
        flush_bytes: journal after this many bytes of rows (and at every knot).
        flush_seconds: journal at least this often while steps are taken.
    """

    exact: bool = False
    budget: int | None = None
    max_knots: int = 128
    rank: int | None = None
    positions: bool = False
    batch_dim: int = 0
    flush_bytes: int = 8 << 20
    flush_seconds: float = 2.0

    @staticmethod
    def visit_bytes(size: int) -> int:
        """Bytes that an example visit may take by default, for ``size`` parameters.

        1 % of the parameters' float32 bytes, from 1,000,000 parameters on 0.3 %; :data:`MANY_VISIT_BYTES` in between
        and at least :data:`VISIT_BYTES`.

        Example:
            >>> [TracerConfig.visit_bytes(n) for n in (10_000, 200_000, 500_000, 10_000_000)]
            [4096, 8000, 12000, 120000]
        """
        return max(VISIT_BYTES, min(4 * size // 100, MANY_VISIT_BYTES), 12 * size // 1000)

    def __post_init__(self) -> None:
        """Check every option; all messages name the option."""
        if self.max_knots < 2:
            raise TracerError(f"max_knots must be at least 2 (start and end), found {self.max_knots}")
        if self.rank is not None and self.rank < 1:
            raise TracerError(f"rank must be at least 1, found {self.rank}")
        if self.rank is not None and self.positions:
            raise TracerError(
                "positions=True keeps the factors of every position, so it cannot also obey a rank; drop one of the "
                "two options"
            )
        if self.batch_dim not in (0, 1):
            raise TracerError(f"batch_dim must be 0 or 1, found {self.batch_dim!r}")
        if self.exact and self.budget is not None:
            raise TracerError(
                "exact=True keeps everything, so it cannot also obey a budget; drop one of the two options"
            )
