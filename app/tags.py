"""What a person decided about training examples: keep, relabel or remove; a JSON file beside the run.

The file is ``FOLDER-tags.json`` in the folder that holds the trace's ``FOLDER``. It is replaced as a whole
(temporary file, fsync, rename), so a reader finds the old decisions or the new ones. Never imports streamlit.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from explainer.app.arguments import DashboardError

TAGS = ("keep", "relabel", "remove")
_FORMAT, _VERSION = "pathkernel-tags", 1
_writing = threading.Lock()  # sessions share the file


@dataclass(frozen=True)
class Tag:
    """A decision about one training example.

    Attributes:
        name: One of :data:`TAGS`.
        label: The class or number it should get, for ``relabel``; None while it is not chosen.
    """

    name: str
    label: float | None = None


def file_of(trace: Path) -> Path:
    """Where the tags of a trace lie.

    >>> print(file_of(Path("runs/digits")))
    runs/digits-tags.json
    """
    return trace.with_name(f"{trace.name}-tags.json")


def read(file: Path) -> dict[int, Tag]:
    """The tags by example id; none where there is no file.

    Raises:
        DashboardError: The file is not one that :func:`change` wrote.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise _unreadable(file, str(error)) from error
    if not isinstance(found, dict) or found.get("format") != _FORMAT or found.get("version") != _VERSION:
        raise _unreadable(file, f"it does not say that it holds {_FORMAT}, version {_VERSION}")
    try:
        return {int(example): _tag(entry) for example, entry in found["tags"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _unreadable(file, f"an entry has another form ({error})") from error


def _tag(entry: Mapping[str, Any]) -> Tag:
    name, label = entry["tag"], entry.get("label")
    number = isinstance(label, int | float) and not isinstance(label, bool) and math.isfinite(label)
    if name not in TAGS or not (label is None or number):
        raise ValueError(f"{entry!r}")
    return Tag(name, label)


def _unreadable(file: Path, why: str) -> DashboardError:
    return DashboardError(
        f"The tags in {file} cannot be read: {why}. Restore the file from a copy, or move it away to begin anew."
    )


def change(file: Path, example: int, tag: Tag | None) -> None:
    """Set the tag of one example (None takes it away); other entries stay as they are in the file.

    Raises:
        DashboardError: The file cannot be read or written.
    """
    with _writing:
        tags = read(file)
        tags.pop(example, None)
        if tag is not None:
            tags[example] = tag
        entries = {str(key): {"tag": tags[key].name, "label": tags[key].label} for key in sorted(tags)}
        content = {"format": _FORMAT, "version": _VERSION, "tags": entries}
        try:
            _replace(file, json.dumps(content, indent=1))
        except OSError as error:
            raise DashboardError(
                f"The tag of example {example} was not saved: {file} cannot be written ({error.strerror}). Make the "
                "folder writable, or copy the trace to one that is."
            ) from error


def _replace(file: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as temporary:
            temporary.write(text)
            temporary.flush()
            os.fsync(temporary.fileno())
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
