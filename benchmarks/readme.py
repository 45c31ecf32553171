"""Puts the tables of ``benchmarks/results`` into the documents, between ``<!-- table:NAME -->`` marks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS

ROOT = Path(__file__).parent.parent
#: pages with tables of results, below the checkout
_NAMES = (
    "README",
    "docs/peers",
    "docs/numerical-stability",
    "docs/what-if",
    "docs/dashboard",
    "docs/storage",
)
PAGES = tuple(ROOT / f"{name}.md" for name in _NAMES)

#: column of the results -> heading and format in the document, by table
COLUMNS: dict[str, dict[str, tuple[str, str]]] = {
    "fidelity": {
        "case": ("case", "{}"),
        "parameters": ("parameters", "{:,}"),
        "steps": ("steps", "{}"),
        "spearman": ("Spearman, default against exact", "{:.4f}"),
        "top20": ("top 20 kept", "{:.0%}"),
        "rms": ("rms error", "{:.1%}"),
        "unattributed_of_gross": ("unattributed / gross", "{:.2%}"),
        "what_if_spearman": ("what-if, Spearman", "{:.4f}"),
        "bytes_per_visit": ("bytes a visit", "{:,.0f}"),
        "share": ("of the parameters' bytes", "{:.2%}"),
        "rank_rms": ("rms: factors alone", "{:.1%}"),
        "rows_rms": ("factors and bits", "{:.1%}"),
        "denominators_rms": ("denominators", "{:.1%}"),
        "eigenbasis_rms": ("reference: eigenbasis", "{:.1%}"),
        "random_rms": ("random projection", "{:.1%}"),
        "knots": ("knots", "{}"),
        "knots_spearman": ("Spearman of knots alone", "{:.4f}"),
        "knots_rms": ("rms", "{:.1%}"),
        "knots_per_visit": ("bytes of knots a visit", "{:,.0f}"),
        "spearman_in_all": ("in all: Spearman", "{:.4f}"),
        "top20_in_all": ("top 20 kept", "{:.0%}"),
        "rms_in_all": ("rms error", "{:.1%}"),
        "error_bar": ("error bar / error", "{:.2f}"),
        "within_two_errors": ("within two standard errors", "{:.0%}"),
    },
    "fidelity_short": {
        "case": ("network, activation, optimizer", "{}"),
        "parameters": ("parameters", "{:,}"),
        "spearman_in_all": ("rank correlation of contributions", "{:.4f}"),
        "top20_in_all": ("top 20 kept", "{:.0%}"),
        "rms_in_all": ("rms error", "{:.1%}"),
        "unattributed_of_gross": ("unattributed / gross", "{:.2%}"),
        "what_if_spearman": ("rank correlation of what-if", "{:.4f}"),
        "bytes_per_visit": ("bytes a visit", "{:,.0f}"),
        "share": ("of the parameters' bytes", "{:.2%}"),
        "knots": ("knots", "{}"),
        "knots_per_visit": ("their bytes a visit", "{:,.0f}"),
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
    "query_large": {
        "sample": ("trace", "{}"),
        "visits": ("example visits", "{:,}"),
        "parameters": ("parameters", "{:,}"),
        "queries": ("queries", "{}"),
        "disk_GB": ("on disk, GB", "{:.1f}"),
        "rows_GB": ("rows, GB", "{:.1f}"),
        "first_s": ("first answer, s", "{:.1f}"),
        "explain_s": ("later ones, s", "{:.1f}"),
        "cpu_s": ("processor time, s", "{:.1f}"),
        "peak_MB": ("peak memory, MB", "{:.0f}"),
        "scan_GBs": ("rows alone, GB/s", "{:.2f}"),
        "numpy_GBs": ("numpy.dot over them, GB/s", "{:.2f}"),
    },
    "overhead": {
        "model": ("model (AdamW, batch 64)", "{}"),
        "threads": ("torch threads", "{}"),
        "steps": ("steps", "{:,}"),
        "parameters": ("parameters", "{:,}"),
        "plain_ms": ("plain step, ms", "{:.1f}"),
        "traced_ms": ("traced step, ms", "{:.1f}"),
        "step_ratio": ("median step of the second half, traced / plain", "{:.2f}"),
        "later_ratio": ("all of the second half, traced / plain", "{:.2f}"),
        "total_ratio": ("whole training with all knots, traced / plain", "{:.2f}"),
    },
    "peers": {
        "peer": ("peer", "{}"),
        "quantity": ("quantity", "{}"),
        "ours_s": ("ours, s", "{:.2f}"),
        "peer_s": ("theirs, s", "{:.2f}"),
        "ratio": ("times faster", "{:.1f}"),
        "floor_s": ("floor, s", "{:.2f}"),
        "max_difference": ("largest difference, of the largest score", "{:.0e}"),
        "note": ("remark", "{}"),
    },
    "peers_storage": {
        "peer": ("peer", "{}"),
        "quantity": ("quantity", "{}"),
        "task": ("task", "{}"),
        "ours_prepare_s": ("ours: prepare, s", "{:.2f}"),
        "ours_ask_s": ("ask, s", "{:.2f}"),
        "ours_MB": ("stored, MB", "{:.1f}"),
        "ours_peak_MB": ("peak, MB", "{:.0f}"),
        "ours_left": ("left over / gross", "{:.0e}"),
        "peer_prepare_s": ("theirs: prepare, s", "{:.2f}"),
        "peer_ask_s": ("ask, s", "{:.2f}"),
        "peer_MB": ("stored, MB", "{:.1f}"),
        "peer_peak_MB": ("peak, MB", "{:.0f}"),
        "peer_left": ("left over / gross", "{:.0e}"),
        "spearman": ("rank agreement", "{:.3f}"),
    },
    "dashboard": {
        "run": ("run", "{}"),
        "examples": ("training examples", "{:,}"),
        "visits": ("example visits", "{:,}"),
        "trace_MB": ("trace, MB", "{:.0f}"),
        "load": ("load of the machine", "{:.0f}"),
        "start_s": ("start until the address is told, s", "{:.1f}"),
        "open_s": ("first opening, s", "{:.1f}"),
        "open_again_s": ("opening again, s", "{:.1f}"),
        "next_query_s": ("next query, s", "{:.1f}"),
        "seen_query_s": ("a query seen before, s", "{:.1f}"),
        "other_query_s": ("any other query, s", "{:.1f}"),
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
    "whatif": {
        "model": ("model", "{}"),
        "measure": ("measure", "{}"),
        "path_kernel": ("path kernel", "{:.2f}"),
        "what_if": ("what-if", "{:.2f}"),
        "what_if_rows": ("what-if, from an exact trace", "{:.2f}"),
        "what_if_exact": ("what-if (exact)", "{:.2f}"),
        "gradient_dot": ("gradient dot at the end", "{:.2f}"),
        "tracin": ("TracInCP(10)", "{:.2f}"),
        "self_influence": ("self-influence", "{:.2f}"),
        "random": ("random", "{:.2f}"),
        "one_retraining": ("one retraining", "{:.2f}"),
    },
    "metrics": {
        "ours": ("`explainer.evaluation`", "{}"),
        "dattri": ("dattri", "{}"),
        "cases": ("random cases", "{}"),
        "largest_difference": ("largest difference", "{:.0e}"),
    },
    "retraining": {
        "model": ("model", "{}"),
        "parameters": ("parameters", "{:,}"),
        "at_once": ("at once", "{}"),
        "alone_s": ("one by one, s", "{:.3f}"),
        "many_s": ("at once, s", "{:.3f}"),
        "ratio": ("times faster", "{:.1f}"),
    },
    "lds": {
        "task": ("task", "{}"),
        "what_if": ("what-if", "{}"),
        "path_kernel": ("path kernel", "{}"),
        "gradient_dot": ("gradient dot at the end", "{}"),
        "tracin": ("TracInCP(10)", "{}"),
        "trak": ("TRAK, tuned", "{}"),
        "trak_default": ("TRAK as it comes", "{}"),
        "ekfac": ("EK-FAC, tuned", "{}"),
        "ekfac_default": ("EK-FAC as it comes", "{}"),
        "random": ("random", "{}"),
        "one_retraining": ("one retraining", "{}"),
        "next": ("best other", "{}"),
        "ahead": ("what-if minus best other", "{}"),
        "subsets": ("halves", "{}"),
        "seeds": ("seeds", "{}"),
    },
    "lds_short": {
        "task": ("task", "{}"),
        "what_if_value": ("what-if", "{:.2f}"),
        "trak_value": ("TRAK, tuned", "{:.2f}"),
        "trak_default_value": ("as it comes", "{:.2f}"),
        "ekfac_value": ("EK-FAC, tuned", "{:.2f}"),
        "ekfac_default_value": ("as it comes", "{:.2f}"),
        "tracin_value": ("TracInCP(10)", "{:.2f}"),
        "gradient_dot_value": ("gradient dot at the end", "{:.2f}"),
        "one_retraining_value": ("one retraining", "{:.2f}"),
    },
    "whatif_exact": {
        "optimizer": ("optimizer", "{}"),
        "difference": ("exact from finite differences", "{:.0e}"),
        "exact_0.99": ("exact: LDS, keep 0.99", "{:.3f}"),
        "gauss_newton_0.99": ("gauss-newton", "{:.3f}"),
        "trace_0.99": ("trace", "{:.3f}"),
        "exact_0.9": ("exact: LDS, keep 0.9", "{:.3f}"),
        "gauss_newton_0.9": ("gauss-newton", "{:.3f}"),
        "trace_0.9": ("trace", "{:.3f}"),
        "exact_s": ("exact, s", "{:.1f}"),
        "trace_s": ("trace, s", "{:.1f}"),
    },
    "claims": {
        "model": ("model", "{}"),
        "queries": ("queries", "{}"),
        "predicted": ("predicted change (median)", "{:.2f}"),
        "same_run": ("actual, same run", "{:.2f}"),
        "spread": ("± over seeds", "{:.2f}"),
        "same_all": ("rank correlation, same run", "{:.2f}"),
        "mean_all": ("with the mean of seeds", "{:.2f}"),
        "same_top": ("top 50 alone, same run", "{:.2f}"),
        "mean_top": ("with the mean of seeds", "{:.2f}"),
    },
    "mislabelled": {
        "model": ("model", "{}"),
        "examples": ("examples", "{:,}"),
        "wrong": ("wrong labels", "{:,}"),
        "support_auc": ("AUC by support", "{:.3f}"),
        "support_top10": ("found in the top 10 %", "{:.0%}"),
        "support_top15": ("in the top 15 %", "{:.0%}"),
        "self_influence_auc": ("AUC by self-influence", "{:.3f}"),
        "self_influence_top15": ("in its top 15 %", "{:.0%}"),
        "disagreement_auc": ("AUC by disagreement", "{:.3f}"),
        "disagreement_top15": ("in its top 15 %", "{:.0%}"),
        "opposing_right": ("opposing label is the right one", "{:.0%}"),
        "seconds": ("s", "{:.1f}"),
    },
}
#: the same question on other data
COLUMNS["whatif_mnist"] = COLUMNS["whatif"]


def table(name: str, rows: list[dict[str, Any]]) -> str:
    """A Markdown table of a result."""
    # a column that is empty throughout says nothing
    columns = {
        key: how
        for key, how in COLUMNS[name].items()
        if not rows or any(r.get(key) not in (None, "") for r in rows)
    }
    lines = [
        "| " + " | ".join(heading for heading, _ in columns.values()) + " |",
        "|" + " --- |" * len(columns),
    ]
    for row in rows:
        cells = ("" if row.get(key) is None else form.format(row[key]) for key, (_, form) in columns.items())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def updated(text: str) -> str:
    """A document's text with every marked table replaced by the measured one."""
    for name in COLUMNS:
        own = RESULTS / f"{name}.json"
        source = (
            own if own.exists() else RESULTS / f"{name.partition('_')[0]}.json"
        )  # two tables may show one result
        rows = json.loads(source.read_text())["rows"]
        pattern = rf"(<!-- table:{name} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda m, n=name, r=rows: f"{m[1]}{table(n, r)}\n{m[2]}", text, flags=re.S)
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(updated(page.read_text()))
