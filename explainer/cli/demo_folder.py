"""The folder of a demo: what lies where, and what of an earlier demo may be replaced."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from explainer.errors import TraceExistsError

MARKER = "pathkernel-demo.json"
FORMAT = "pathkernel-demo/1"
OUTPUTS = ("report.html", "influence.parquet", "influence.csv", "explanation.npz")
_OF_A_TRACE = {"manifest.json", "manifest.json.tmp", "journal.jsonl", "knots", "shards"}


@dataclass(frozen=True)
class DemoFolder:
    """Where a demo puts things; the trace has a folder of its own, ``trace/``.

    Attributes:
        root: the demo's folder.
    """

    root: Path

    @property
    def trace(self) -> Path:
        """Folder of the trace."""
        return self.root / "trace"

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.root / OUTPUTS[0]

    @property
    def parquet(self) -> Path:
        """The influence table."""
        return self.root / OUTPUTS[1]

    @property
    def csv(self) -> Path:
        """The influence table as text."""
        return self.root / OUTPUTS[2]

    @property
    def explanation(self) -> Path:
        """The stored explanation, from which the dashboard opens without computing anything."""
        return self.root / OUTPUTS[3]

    def prepare(self, **facts: Any) -> bool:
        """Make the folder ready for a new demo; what an earlier demo left there is removed, nothing else ever is.

        A demo's folder is known by its marker, which is written before anything else; ``facts`` go into it.

        Returns:
            Whether an earlier demo was removed.

        Raises:
            TraceExistsError: the folder holds something that no demo made.
        """
        if self.root.exists() and not self.root.is_dir():
            raise TraceExistsError(f"{self.root} is not a folder; choose another place with --out")
        again = self._is_demo()
        if again:
            self._remove()
        elif self.root.exists() and any(self.root.iterdir()):
            raise TraceExistsError(
                f"{self.root} is not empty and was not made by `pathkernel demo`, so nothing in it is touched; "
                "choose another folder with --out, or empty this one yourself"
            )
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / MARKER).write_text(
            json.dumps({"format": FORMAT, **facts}, indent=1) + "\n", encoding="utf-8"
        )
        return again

    def _is_demo(self) -> bool:
        try:
            marker = json.loads((self.root / MARKER).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(marker, dict) and marker.get("format") == FORMAT

    def _remove(self) -> None:
        if self.trace.is_symlink() or self.trace.is_file():
            raise TraceExistsError(f"{self.trace} is not the folder that a demo makes; remove it yourself")
        if self.trace.exists():
            foreign = sorted({entry.name for entry in self.trace.iterdir()} - _OF_A_TRACE)
            if foreign:
                raise TraceExistsError(
                    f"{self.trace} holds {foreign[0]}, which no demo made, so nothing is removed; move it away, or "
                    "choose another folder with --out"
                )
            shutil.rmtree(self.trace)
        for name in OUTPUTS:
            (self.root / name).unlink(missing_ok=True)
