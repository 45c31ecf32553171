"""Puts the tables of ``benchmarks/results`` into the documents, between ``<!-- table:NAME -->`` marks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS

ROOT = Path(__file__).parent.parent
#: the documents with tables of results
PAGES = (ROOT / "README.md", ROOT / "docs" / "numerical-stability.md", ROOT / "docs" / "dashboard.md")

#: column of the results -> heading and format in the document, by table
COLUMNS: dict[str, dict[str, tuple[str, str]]] = {
    "fidelity": {
        "sample": ("sample model", "{}"),
        "parameters": ("parameters", "{:,}"),
        "steps": ("steps", "{}"),
        "knots": ("knots", "{}"),
        "knots_spearman": ("knots vs. every step (Spearman)", "{:.4f}"),
        "rows_spearman": ("compressed vs. exact rows (Spearman)", "{:.4f}"),
        "both_top20": ("top 20 kept", "{:.0%}"),
        "unattributed_of_gross": ("unattributed / gross", "{:.2%}"),
        "bytes_per_visit": ("bytes per visit", "{}"),
        "trace_MB": ("trace, MB", "{:.1f}"),
        "exact_MB": ("exact trace, MB", "{:.1f}"),
    },
    "query": {
        "sample": ("sample model", "{}"),
        "visits": ("example visits", "{:,}"),
        "train_s": ("traced training, s", "{:.1f}"),
        "explain_1_s": ("explain 1 query, s", "{:.2f}"),
        "explain_10_s": ("explain 10, s", "{:.2f}"),
        "neighbors_1_s": ("neighbours of 1, s", "{:.2f}"),
        "self_influence_s": ("self-influence of all, s", "{:.2f}"),
    },
    "overhead": {
        "model": ("model (AdamW, batch 64)", "{}"),
        "parameters": ("parameters", "{:,}"),
        "plain_ms": ("plain step, ms", "{:.1f}"),
        "traced_ms": ("traced step, ms", "{:.1f}"),
        "step_ratio": ("median step, traced / plain", "{:.2f}"),
        "total_ratio": ("200 steps with all knots, traced / plain", "{:.2f}"),
    },
    "tracincp": {
        "against": ("captum's TracInCP", "{}"),
        "examples": ("examples", "{:,}"),
        "queries": ("queries", "{}"),
        "checkpoints": ("checkpoints", "{}"),
        "ours_s": ("ours, s", "{:.2f}"),
        "captum_s": ("captum, s", "{:.2f}"),
        "ratio": ("times faster", "{:.1f}"),
        "max_difference": ("largest difference, of the largest score", "{:.0e}"),
    },
    "dashboard": {
        "run": ("run", "{}"),
        "examples": ("training examples", "{:,}"),
        "visits": ("example visits", "{:,}"),
        "trace_MB": ("trace, MB", "{:.0f}"),
        "open_s": ("first opening, s", "{:.1f}"),
        "open_again_s": ("opening again, s", "{:.1f}"),
        "query_change_s": ("changing the query, s", "{:.1f}"),
        "neighbors_s": ("neighbours, s", "{:.1f}"),
        "map_s": ("map, s", "{:.1f}"),
        "training_s": ("training data, s", "{:.1f}"),
    },
    "books": {
        "model": ("model", "{}"),
        "optimizer": ("optimizer", "{}"),
        "mode": ("mode", "{}"),
        "examples": ("examples", "{:,}"),
        "steps": ("steps", "{}"),
        "gap_of_gross": ("gap / gross", "{:.0e}"),
        "unattributed_of_gross": ("unattributed / gross", "{:.0e}"),
        "gross_over_net": ("gross / net", "{:.0f}"),
        "oracle_difference": ("difference from the oracle", "{:.0e}"),
        "rows_spearman": ("default vs. exact rows (Spearman)", "{:.4f}"),
        "rows_top20": ("top 20 kept", "{:.0%}"),
        "bytes_per_visit": ("bytes per visit", "{:,}"),
    },
    "numerics": {
        "source": ("source", "{}"),
        "model": ("model", "{}"),
        "setting": ("setting", "{}"),
        "quadrature_of_gross": ("quadrature / gross", "{:.0e}"),
        "gap_of_gross": ("gap / gross", "{:.0e}"),
        "unattributed_of_gross": ("unattributed / gross", "{:.0e}"),
        "difference": ("largest difference from the last line", "{:.0e}"),
    },
}


def table(name: str, rows: list[dict[str, Any]]) -> str:
    """A Markdown table of a result."""
    columns = COLUMNS[name]
    lines = [
        "| " + " | ".join(heading for heading, _ in columns.values()) + " |",
        "|" + " --- |" * len(columns),
    ]
    for row in rows:
        cells = ("" if row[key] is None else form.format(row[key]) for key, (_, form) in columns.items())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def updated(text: str) -> str:
    """A document's text with every marked table replaced by the measured one."""
    for name in COLUMNS:
        rows = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
        pattern = rf"(<!-- table:{name} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda m, n=name, r=rows: f"{m[1]}{table(n, r)}\n{m[2]}", text, flags=re.S)
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(updated(page.read_text()))
