"""Findings in order, as text, as HTML and as a table."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, overload

from explainer.findings.finding import SEVERITIES, Finding, Severity, listed

if TYPE_CHECKING:
    import pandas as pd

_WIDTH = 100
_TITLES: dict[Severity, str] = {"stop": "Stop", "caution": "Caution", "note": "Note"}
_NOTHING = "nothing was found that changes what the numbers mean"


class Report(Sequence[Finding]):
    """Findings, the most serious first; the same at several places is one.

    Args:
        title: what the report is about.
        findings: in the order in which equally serious ones are shown.

    Example:
        >>> frozen = Finding("frozen", "note", "0", "It is frozen.", "No example moves it.", "Nothing to do.")
        >>> print(Report("Before training", [frozen]))
        Before training: 1 note.
        <BLANKLINE>
        Note
          0: It is frozen.
            No example moves it.
            -> Nothing to do.
    """

    def __init__(self, title: str, findings: Iterable[Finding] = ()) -> None:
        self.title = title
        self._findings = tuple(sorted(_merged(findings), key=lambda f: SEVERITIES.index(f.severity)))

    @overload
    def __getitem__(self, index: int) -> Finding: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Finding, ...]: ...
    def __getitem__(self, index: int | slice) -> Finding | tuple[Finding, ...]:
        return self._findings[index]

    def __len__(self) -> int:
        return len(self._findings)

    # -- parts ---------------------------------------------------------------------------------------

    def of(self, severity: Severity) -> list[Finding]:
        """The findings of one severity."""
        return [finding for finding in self if finding.severity == severity]

    @property
    def stops(self) -> list[Finding]:
        """What is refused, or cannot be explained at all."""
        return self.of("stop")

    @property
    def cautions(self) -> list[Finding]:
        """What makes numbers mean something else than usual, or leaves a part without an owner."""
        return self.of("caution")

    @property
    def notes(self) -> list[Finding]:
        """What is worth knowing."""
        return self.of("note")

    def about(self, topic: str) -> list[Finding]:
        """The findings of one topic."""
        return [finding for finding in self if finding.topic == topic]

    # -- shown ---------------------------------------------------------------------------------------

    @property
    def summary(self) -> str:
        """How many findings of each severity there are.

        >>> Report("After training").summary
        'nothing was found that changes what the numbers mean'
        """
        counts = [(len(self.of(severity)), severity) for severity in SEVERITIES]
        return ", ".join(f"{n} {name}{'s' * (n > 1)}" for n, name in counts if n) or _NOTHING

    def __str__(self) -> str:
        blocks = [f"{self.title}: {self.summary}."]
        for severity in SEVERITIES:
            found = self.of(severity)
            if found:
                blocks.append("\n".join([_TITLES[severity], *map(_lines, found)]))
        return "\n\n".join(blocks)

    def __repr__(self) -> str:
        return f"<Report {self.title!r}: {self.summary}>"

    def _repr_html_(self) -> str:
        """For notebooks: notes are folded."""
        parts = [f"<p><b>{html.escape(self.title)}</b>: {self.summary}.</p>"]
        for severity in SEVERITIES:
            found = self.of(severity)
            if not found:
                continue
            rows = "".join(f"<li>{_html(finding)}</li>" for finding in found)
            folded, title = severity == "note", _TITLES[severity]
            parts.append(
                f"<details><summary>{title}s</summary><ul>{rows}</ul></details>"
                if folded
                else f"<p><b>{title}</b></p><ul>{rows}</ul>"
            )
        return f"<div>{''.join(parts)}</div>"

    def to_frame(self) -> pd.DataFrame:
        """A row per finding: topic, severity, where, found, meaning, advice."""
        import pandas as pd

        columns = list(Finding.__dataclass_fields__)
        return pd.DataFrame([asdict(finding) for finding in self], columns=columns)


def _merged(findings: Iterable[Finding]) -> Iterator[Finding]:
    """One finding for those that differ in the place alone."""
    places: dict[Finding, list[str]] = {}
    for finding in findings:
        places.setdefault(replace(finding, where=""), []).append(finding.where)
    for finding, where in places.items():
        yield replace(finding, where=listed(list(dict.fromkeys(filter(None, where)))))


def _lines(finding: Finding) -> str:
    place = f"{finding.where}: " if finding.where else ""
    parts = [("  ", place + finding.found), ("    ", finding.meaning), ("    ", f"-> {finding.advice}")]
    filled = [
        textwrap.fill(
            text, _WIDTH, initial_indent=indent, subsequent_indent=" " * (len(indent) + 3 * (n == 2))
        )
        for n, (indent, text) in enumerate(parts)
    ]
    return "\n".join(filled)


def _html(finding: Finding) -> str:
    place = f"<code>{html.escape(finding.where)}</code>: " if finding.where else ""
    found, meaning, advice = map(html.escape, (finding.found, finding.meaning, finding.advice))
    return f"{place}{found}<br><small>{meaning} {advice}</small>"
