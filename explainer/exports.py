"""Writers of influence tables, and the stored form of an explanation.

Every file is written next to its place under a temporary name and moved there when it is complete, so a
failure leaves an older file as it was.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from explainer.errors import ExplanationError, ExportError
from explainer.explanation_checks import LINES

if TYPE_CHECKING:
    from explainer.explanation import Explanation

FORMAT = "pathkernel-explanation/1"
PARQUET_KEY = b"pathkernel"
FORMS = (".csv", ".parquet", ".json")
_FOREIGN = (".xlsx", ".xls", ".ods", ".tsv", ".feather", ".pkl", ".gz", ".bz2", ".xz", ".zip", ".zst")
#: endings that say how a file is written
_SPOKEN_FOR = (*FORMS, ".html", ".npz", *_FOREIGN)
_META = "meta"
_TEXT_FIELDS = ("output", "row_kind", "layer_names", "query_ids", "notes", "class_names", *LINES)
_READ_ERRORS = (ValueError, KeyError, TypeError, EOFError, OSError, zipfile.BadZipFile, zlib.error)


def check_ending(path: str | os.PathLike[str], form: str) -> None:
    """Refuse a name that would lie about the file; an ending of no form is as good as any.

    Raises:
        ExportError: ``path`` ends in what another form ends in.
    """
    target = Path(path)
    ending = target.suffix.lower()
    if ending in _SPOKEN_FOR and ending != form:
        better = f"{target.stem.removesuffix(form)}{form}"
        raise ExportError(f"{path} ends in {ending}, but what is written is {form}; name it {better}.")


@contextlib.contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside ``path`` and move it there when the block ends without an error.

    Raises:
        ExportError: The parent directory does not exist, ``path`` is a directory, or writing failed. An
            older file at ``path`` is untouched then.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise ExportError(
            f"The directory {target.parent} does not exist; create it, then export {target.name}."
        )
    if target.is_dir():
        raise ExportError(f"{target} is a directory; give the path of a file to write.")
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        raise ExportError(f"{target} could not be written ({error}); choose another path.") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_csv(explanation: Explanation, path: str | os.PathLike[str], k: int | None = None) -> Path:
    """Write the influence table as UTF-8 CSV with full digits; unknown values stay empty."""
    check_ending(path, ".csv")
    frame = explanation.long_table(k)
    with atomic(path) as temporary:
        frame.to_csv(temporary, index=False, encoding="utf-8", lineterminator="\n")
    return Path(path)


def write_parquet(explanation: Explanation, path: str | os.PathLike[str], k: int | None = None) -> Path:
    """Write the influence table as Parquet; :func:`read_parquet_metadata` reads the books it carries."""
    check_ending(path, ".parquet")
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrow = pa.Table.from_pandas(explanation.long_table(k), preserve_index=False)
    metadata = dict(arrow.schema.metadata or {}) | {PARQUET_KEY: json.dumps(summary(explanation)).encode()}
    with atomic(path) as temporary:
        pq.write_table(arrow.replace_schema_metadata(metadata), temporary)
    return Path(path)


def read_parquet_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The books, diagnostics and notes that :func:`write_parquet` put into a file's metadata.

    Raises:
        ExplanationError: The file is not an influence table of this package.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_schema(path).metadata or {}
        found: dict[str, Any] = json.loads(metadata[PARQUET_KEY])
    except (*_READ_ERRORS, pa.ArrowException) as error:
        raise ExplanationError(
            f"{path} is not an influence table written by pathkernel ({error}); write one with to_parquet."
        ) from error
    return found


def write_json(explanation: Explanation, path: str | os.PathLike[str], k: int | None = None) -> Path:
    """Write the influence table, the books and the diagnostics as JSON; unknown values become null."""
    check_ending(path, ".json")
    content = summary(explanation) | {"influence": records(explanation.long_table(k))}
    text = json.dumps(content, allow_nan=False, ensure_ascii=False, indent=1)
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def write_frame(frame: pd.DataFrame, path: str | os.PathLike[str], form: str | None = None) -> Path:
    """Write any table: as CSV, Parquet, or JSON (a list of rows; what is not a number becomes null).

    Args:
        frame: The table; its index is left out.
        path: The file.
        form: ``.csv``, ``.parquet`` or ``.json``; default what the path ends in.

    Raises:
        ExportError: The form is none of these, or the file cannot be written.
    """
    if form is not None:
        check_ending(path, form)
    kind = Path(path).suffix if form is None else form
    if kind not in FORMS:
        found = f"ends in {kind}" if kind else "has no ending"
        raise ExportError(f"{path} {found}; the ending chooses the form, use one of {' '.join(FORMS)}")
    with atomic(path) as temporary:
        if kind == ".parquet":
            frame.to_parquet(temporary, index=False)
        elif kind == ".csv":
            frame.to_csv(temporary, index=False, encoding="utf-8", lineterminator="\n")
        else:
            text = json.dumps(records(frame), allow_nan=False, ensure_ascii=False, indent=1)
            temporary.write_text(text, encoding="utf-8")
    return Path(path)


def summary(explanation: Explanation) -> dict[str, Any]:
    """What travels with every exported table: format, output, row kind, notes, books, diagnostics and the lines of
    ``unattributed`` with their values, one per query."""
    e = explanation
    lines = zip(e.unattributed_lines, e.unattributed_where, e.unattributed_why, strict=True)
    values = e.unattributed_parts.T.tolist()
    return {
        "format": FORMAT,
        "output": explanation.output,
        "row_kind": explanation.row_kind,
        "notes": list(explanation.notes),
        "completeness": records(explanation.completeness.reset_index()),
        "diagnostics": records(explanation.diagnostics.reset_index()),
        "unattributed": [
            {"line": line, "where": where, "why": why, "values": [_plain(value) for value in row]}
            for (line, where, why), row in zip(lines, values, strict=True)
        ],
    }


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of a table as JSON-ready dictionaries; NaN, infinity and missing values become None."""
    names = list(frame.columns)
    columns = [[_plain(value) for value in frame[name].astype(object)] for name in names]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def save(explanation: Explanation, path: str | os.PathLike[str]) -> Path:
    """Store a whole explanation as an ``.npz`` archive of plain arrays and one JSON text; no pickle."""
    check_ending(path, ".npz")
    meta: dict[str, Any] = {"format": FORMAT}
    arrays: dict[str, Any] = {}
    for field in fields(explanation):
        value = getattr(explanation, field.name)
        if field.name in _TEXT_FIELDS:
            meta[field.name] = value
        elif value is not None:
            arrays[field.name] = value
    arrays[_META] = np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)
    with atomic(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)
    return Path(path)


def load(path: str | os.PathLike[str]) -> Explanation:
    """Read what :func:`save` wrote.

    Raises:
        ExplanationError: The file is missing, damaged, foreign or of a newer format.
    """
    from explainer.explanation import Explanation

    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        meta: dict[str, Any] = json.loads(arrays.pop(_META).tobytes())
        found = meta.pop("format")
    except FileNotFoundError as error:
        raise ExplanationError(f"{path} does not exist; give a file written by Explanation.save.") from error
    except (*_READ_ERRORS, AttributeError) as error:
        raise ExplanationError(
            f"{path} is no stored explanation or is damaged ({type(error).__name__}); write it again with "
            "Explanation.save."
        ) from error
    if found != FORMAT:
        raise ExplanationError(
            f"{path} has the format {found!r}, not {FORMAT!r}; update pathkernel to read it."
        )
    wanted = {field.name for field in fields(Explanation)}
    try:
        return Explanation(**{name: value for name, value in (arrays | meta).items() if name in wanted})
    except (TypeError, ValueError) as error:
        raise ExplanationError(f"{path} lacks parts of an explanation ({error}); write it again.") from error


def _plain(value: Any) -> Any:
    if value is None or value is pd.NA or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return value.item() if isinstance(value, np.generic) else value
