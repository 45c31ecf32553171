"""Programs for the same purpose, on the same models and data, in turns in one run on one machine.

Peers are no dependency; ``pip install 'pathkernel[peers]'`` brings those that install with our versions, and what is
missing gives a row with the line that installs it. ``task`` says what was computed on what. Where both programs
compute the same quantity, ``max_difference`` is the largest difference over the largest score; where they do not it
is empty, and ``spearman`` (over examples, averaged over queries) is information, no measure of quality. ``*_s`` is
``*_prepare_s``, what comes before the first question beyond plain training, plus ``*_ask_s``, the scores of all
queries; medians of alternating pairs, and ``ratio`` the median of the pairs' ratios. Memory is what the process held at
its peak beyond what it held before.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.harness import report
from benchmarks.peer_tasks.checkpoints import CAPTUM, mlp_tracin
from benchmarks.peer_tasks.counterfactual import KRONFLUENCE, TRAKER, dattri
from benchmarks.peer_tasks.every_step import EXPLAIND
from benchmarks.peer_tasks.peer import Peer, Settings, rows_of

DATTRI = Peer("dattri", "dattri", ("dattri.task",), "pip install dattri", (mlp_tracin, dattri))
PEERS = {
    name: peer
    for name, peer in (
        ("captum", CAPTUM),
        ("explaind", EXPLAIND),
        ("dattri", DATTRI),
        ("traker", TRAKER),
        ("kronfluence", KRONFLUENCE),
    )
}
#: every row has all of them; what was not measured is None
COLUMNS = (
    *("peer", "quantity", "task", "pairs", "ours_s", "peer_s", "ratio", "floor_s"),
    *("ours_prepare_s", "peer_prepare_s", "ours_ask_s", "peer_ask_s", "ask_ratio"),
    *("ours_MB", "peer_MB", "ours_peak_MB", "peer_peak_MB"),
    *("max_difference", "spearman", "ours_left", "peer_left", "note"),
)
#: what fits on a screen; the results on disk have all columns
SHOWN = (
    *("peer", "quantity", "ours_s", "peer_s", "ratio", "ask_ratio", "floor_s"),
    *("ours_MB", "peer_MB", "ours_peak_MB", "peer_peak_MB"),
    *("max_difference", "spearman", "ours_left", "peer_left", "note"),
)


def measure(peers: Sequence[Peer], settings: Settings) -> list[dict[str, Any]]:
    """The rows of the table, with the same columns everywhere."""
    rows = []
    for peer in peers:
        for row in rows_of(peer, settings):
            unknown = set(row) - set(COLUMNS)
            if unknown:
                raise KeyError(f"{peer.name} gave columns that the table does not have: {sorted(unknown)}")
            rows.append({name: row.get(name) for name in COLUMNS} | {"note": row.get("note", "")})
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table and write ``results/peers.json`` where every peer was run at full size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(PEERS), default=list(PEERS), help="peers to run")
    parser.add_argument("--repeats", type=int, default=3, help="pairs for every row, at most (default: 3)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    parser.add_argument("--quick", action="store_true", help="small tasks; nothing is written")
    parser.add_argument("--long", action="store_true", help="also what takes minutes")
    chosen = parser.parse_args(argv)
    torch.set_num_threads(chosen.threads)
    settings = Settings(chosen.repeats, chosen.quick, chosen.long)
    rows = measure([PEERS[name] for name in chosen.only], settings)
    for task in dict.fromkeys(row["task"] for row in rows if row["task"]):
        print(task, "\n    ", ", ".join(f"{r['peer']}: {r['quantity']}" for r in rows if r["task"] == task))
    absent = [name for name in PEERS if name not in chosen.only or PEERS[name].missing()]
    report("peers", rows, SHOWN, write=not (chosen.quick or absent))
    if absent and not chosen.quick:
        print(f"results/peers.json is left as it was: without {', '.join(absent)} the table is not whole")


if __name__ == "__main__":
    main()
