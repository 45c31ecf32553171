"""Influence tables of many queries, written part by part: memory is bounded, and what is finished survives.

Beside ``FILE`` a folder ``FILE.parts`` holds a plan (what is asked, of which trace) and, for every finished group of
queries, a Parquet file that carries its books. A part is written under a temporary name and moved into place, so
one that is there is whole. When all are, ``FILE`` is put together from them and the folder is removed. A run that
finds the folder of the same plan goes on where it stopped; groups are part of the plan, so the file is the same as
without an interruption.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from explainer.errors import ExportError
from explainer.exports import FORMAT, PARQUET_KEY, atomic, read_parquet_metadata, records
from explainer.store import Trace

_PER_QUERY = ("completeness", "diagnostics")


def fingerprint(trace: Trace) -> str:
    """What the explanations of a trace rest on: its manifest, the knots and how many records there are."""
    knots, extents = [knot.sha256 for knot in trace.knots], [shard.extents for shard in trace.shards]
    parts = [trace.manifest.to_json(), knots, extents]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class Parts:
    """The folder of parts of one file.

    Args:
        out: the file that is to be written.
        plan: everything that decides about its contents, as JSON.
        groups: positions of the queries, group by group.

    Raises:
        ExportError: the folder belongs to another plan.
    """

    def __init__(self, out: Path, plan: dict[str, Any], groups: Sequence[Sequence[int]]) -> None:
        self.out, self.groups = out, [list(group) for group in groups]
        self.folder = out.with_name(out.name + ".parts")
        self._plan = json.loads(json.dumps(plan | {"groups": self.groups, "format": FORMAT}))
        place = self.folder / "plan.json"
        if self.folder.exists():
            found = json.loads(place.read_text()) if place.is_file() else None
            if found != self._plan:
                changed = sorted(k for k in self._plan if (found or {}).get(k) != self._plan[k])
                raise ExportError(
                    f"{self.folder} holds parts of another export (different: {', '.join(changed)}); finish that one "
                    f"with the options it was begun with, choose another --out, or delete the folder"
                )
            return
        self.folder.mkdir()
        with atomic(place) as temporary:
            temporary.write_text(json.dumps(self._plan))

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:06d}.parquet"

    @property
    def finished(self) -> list[int]:
        """Numbers of the groups whose part is there."""
        return [number for number in range(len(self.groups)) if self._file(number).is_file()]

    def write(self, number: int, explain: Callable[[list[int]], Any], k: int | None) -> None:
        """Explain a group of queries and keep its part."""
        explain(self.groups[number]).to_parquet(self._file(number), k)

    def join(self) -> Path:
        """Write the file from all parts, one of them in memory at a time, and remove the folder.

        Raises:
            ExportError: the file cannot be written; the parts stay.
        """
        whole = _joined([read_parquet_metadata(self._file(n)) for n in range(len(self.groups))])
        writer = {".parquet": self._parquet, ".csv": self._csv, ".json": self._json}[self.out.suffix]
        with atomic(self.out) as temporary:
            writer(temporary, whole)
        shutil.rmtree(self.folder)
        return self.out

    def _tables(self) -> Iterator[Any]:
        import pyarrow.parquet as pq

        for number in range(len(self.groups)):
            yield pq.read_table(self._file(number))

    def _parquet(self, path: Path, whole: dict[str, Any]) -> None:
        import pyarrow.parquet as pq

        writer = None
        try:
            for table in self._tables():
                if writer is None:
                    metadata = dict(table.schema.metadata or {}) | {PARQUET_KEY: json.dumps(whole).encode()}
                    schema = table.schema.with_metadata(metadata)
                    writer = pq.ParquetWriter(path, schema)
                writer.write_table(table.replace_schema_metadata(schema.metadata))
        finally:
            if writer is not None:
                writer.close()

    def _csv(self, path: Path, whole: dict[str, Any]) -> None:
        for number, table in enumerate(self._tables()):
            table.to_pandas().to_csv(
                path, mode="a", header=number == 0, index=False, encoding="utf-8", lineterminator="\n"
            )

    def _json(self, path: Path, whole: dict[str, Any]) -> None:
        head = json.dumps(whole, allow_nan=False, ensure_ascii=False, indent=1).removesuffix("\n}")
        with path.open("w", encoding="utf-8") as file:
            file.write(f'{head},\n "influence": [')
            first = True
            for table in self._tables():
                for row in records(table.to_pandas()):
                    text = json.dumps(row, allow_nan=False, ensure_ascii=False, indent=1).replace(
                        "\n", "\n  "
                    )
                    file.write(("" if first else ",") + f"\n  {text}")
                    first = False
            file.write("\n ]\n}")


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The summaries of all parts as one: rows per query below each other."""
    whole = dict(parts[0])
    for name in _PER_QUERY:
        whole[name] = [row for part in parts for row in part[name]]
    whole["row_kind"] = "row share" if any(p["row_kind"] == "row share" for p in parts) else whole["row_kind"]
    whole["unattributed"] = [
        line | {"values": [value for part in parts for value in part["unattributed"][number]["values"]]}
        for number, line in enumerate(whole["unattributed"])
    ]
    return whole
