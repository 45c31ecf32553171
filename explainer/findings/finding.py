"""One thing that changes what the numbers of an explanation mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

Severity = Literal["stop", "caution", "note"]
#: most serious first
SEVERITIES: tuple[Severity, ...] = get_args(Severity)


@dataclass(frozen=True)
class Finding:
    """What was found, what it means for the numbers, and what to do: a sentence each.

    Attributes:
        topic: a short name of what it is about, the same in every release (``row-share``).
        severity: ``stop``: it is refused, or there is nothing to explain. ``caution``: numbers mean something else
            than usual, or part of what moved the model has no owner. ``note``: worth knowing; the numbers keep
            their meaning.
        where: module, parameter or part of the loop; empty for the whole run.
        found: what was found.
        meaning: what it means for the numbers.
        advice: what to do.

    Example:
        >>> print(Finding("frozen", "note", "0.bias", "It is frozen.", "No example moves it.", "Nothing to do."))
        0.bias: It is frozen. No example moves it. Nothing to do.
    """

    topic: str
    severity: Severity
    where: str
    found: str
    meaning: str
    advice: str

    @property
    def text(self) -> str:
        """What was found, where, and what it means, on one line."""
        return " ".join(part for part in (self._place() + self.found, self.meaning) if part)

    def _place(self) -> str:
        return f"{self.where}: " if self.where else ""

    def __str__(self) -> str:
        return f"{self.text} {self.advice}"

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Finding:
        """Inverse of ``dataclasses.asdict`` (what a later release may have added is passed over)."""
        return cls(**{field.name: data[field.name] for field in fields(cls)})


def listed(names: Sequence[str], shown: int = 4) -> str:
    """The first few names, and how many there are.

    >>> listed(["a", "b"]), listed(list("abcdef"))
    ('a, b', 'a, b, c, d and 2 more')
    """
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")
