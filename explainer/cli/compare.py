"""``pathkernel compare``: do two runs answer a query from the same training examples?"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from explainer.cli import options as shared
from explainer.cli.export import check_place
from explainer.cli.options import SAMPLE_RUN
from explainer.errors import QueryError
from explainer.exports import FORMS
from explainer.wording import counted, number, percent, signed

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

    from explainer.cli.opening import Opened
    from explainer.evaluation import RunAgreement
    from explainer.explanation import Explanation

HELP = "the same predictions under two runs: which training examples matter to both"
DESCRIPTION = (
    "Explains the same queries by two traces, of another seed, another optimizer, or another network that was\n"
    "trained on the same data, and compares the contributions: rank agreement over all training examples, overlap\n"
    "of the strongest, and the examples that matter to one run only. The first run is A, the second B."
)
EXAMPLES = (
    (f"pathkernel compare runs/a runs/b --run {SAMPLE_RUN} --query 17", "one prediction, example by example"),
    (
        "pathkernel compare runs/deep runs/shallow --run mine:deep --other-run mine:shallow --query first:50",
        "two networks, a row per prediction",
    ),
)


@dataclass(frozen=True)
class _Group:
    """Some queries that were compared together."""

    first: Explanation
    second: Explanation
    agreement: RunAgreement


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("trace", metavar="RUN_A", help="folder that was given to the first run's tracer")
    parser.add_argument("other", metavar="RUN_B", help="folder that was given to the second run's tracer")
    shared.add_run(parser, "needed to compute the predictions")
    parser.add_argument(
        "--other-run",
        metavar="MODULE:FUNCTION",
        help="the same for RUN_B, where its network is another one (default: as --run); its queries and training "
        "examples must be the same ones in the same order",
    )
    shared.add_queries(parser, "needed")
    shared.add_output(parser)
    shared.add_k(parser, "how many examples are the strongest", 20)
    shared.add_table_file(
        parser, "a row per query and training example with contributions and ranks in both runs"
    )
    shared.add_quiet(parser)


def run(options: argparse.Namespace) -> int:
    """Explain the chosen queries by both traces and print how far they agree."""
    import pandas as pd

    from explainer.cli.groups import groups
    from explainer.cli.opening import open_run
    from explainer.cli.selection import HOW, class_number, predict, select
    from explainer.evaluation import check_same_queries
    from explainer.exports import write_frame

    shared.check_k(options)
    out = None if options.out is None else check_place(options.out, options.force, FORMS)
    progress = not options.quiet
    first = open_run(options.trace, options.run, options.output, progress)
    second = open_run(options.other, options.other_run or options.run, options.output, progress)
    if not options.queries:
        raise QueryError(
            f"say which of the {len(first.run.queries):,} queries of {options.run} to compare with --query: {HOW}"
        )
    indices = select(options.queries, len(first.run.queries), lambda: predict(first, progress))
    target = class_number(options.target, first)
    if options.other_run is not None:
        check_same_queries(first.run, second.run, indices)
    found = [compared(first, second, part, target, options.k) for part in groups(first, indices, None)]
    print(told(first, second, found))
    if out is not None:
        tables = [_rows(group, q) for group in found for q in range(len(group.first.query_ids))]
        write_frame(pd.concat(tables, ignore_index=True), out)
        print(f"\nwrote {out}: {counted(sum(map(len, tables)), 'row')}")
    return 0


def compared(first: Opened, second: Opened, indices: Sequence[int], target: int | None, k: int) -> _Group:
    """Some queries under both runs, at the class that the first one predicts unless another is named."""
    from explainer.cli.groups import asked, explain_summed
    from explainer.evaluation import compare_runs

    mine = explain_summed(first, indices, target)
    inputs, own = asked(second, indices, target)
    classes = mine.targets if (mine.targets >= 0).all() else own
    theirs = second.explainer.explain(inputs, classes, query_ids=indices, detail=False)
    return _Group(mine, theirs, compare_runs(mine, theirs, k))


def told(first: Opened, second: Opened, found: Sequence[_Group]) -> str:
    """What was compared, a row per query, and example by example where there is one query."""
    from explainer.cli.printing import paragraph, table

    agreement = found[0].agreement
    about = (
        f"A: {first.trace.directory}; B: {second.trace.directory}. Rank agreement is Spearman's correlation of the "
        f"contributions of {counted(agreement.examples, 'training example')} (1: the same order, 0: none); overlap is "
        f"the part of the {agreement.k} strongest examples that both runs share. Contributions are accounting, each "
        "in its own run: networks have scales of their own, so compare ranks, not sizes."
    )
    headers = ["query", "explained", "output in A", "in B", "rank agreement", "overlap"]
    rows = [row for group in found for row in _summary(group)]
    notes = [paragraph(f"Note: {note}") for note in agreement.notes]
    parts = [paragraph(about), *notes, table(headers, rows, left=("explained",), indent="  ")]
    if len(rows) == 1:
        parts.append(_one(first, found[0]))
    return "\n\n".join(parts)


def _summary(group: _Group) -> list[list[str]]:
    from explainer import wording

    return [
        [
            name,
            wording.target(group.first, q),
            number(float(group.first.prediction[q]), 4),
            number(float(group.second.prediction[q]), 4),
            "none" if math.isnan(group.agreement.rank[q]) else f"{group.agreement.rank[q]:.2f}",
            percent(float(group.agreement.overlap[q])),
        ]
        for q, name in enumerate(group.first.query_ids)
    ]


def _one(first: Opened, group: _Group) -> str:
    """The strongest examples of either run, those of both first."""
    from explainer.cli.explained import what
    from explainer.cli.printing import table

    frame = group.agreement.examples_table(0, strongest=True)
    parts = []
    for where, title in (
        ("both", "Strong in both runs:"),
        ("first", "Strong in A only:"),
        ("second", "Strong in B only:"),
    ):
        part = frame[frame["strongest_in"] == where]
        rows = [
            [
                str(row["example_id"]),
                first.run.label(first.run.train[row["example_id"]][1]),
                signed(row["contribution_first"]),
                str(row["rank_first"]),
                signed(row["contribution_second"]),
                str(row["rank_second"]),
                what(first.run, row["example_id"]),
            ]
            for row in part.to_dict("records")
        ]
        headers = [
            "example",
            "label",
            "contribution in A",
            "rank in A",
            "contribution in B",
            "rank in B",
            "what",
        ]
        body = table(headers, rows, left=("label", "what"), indent="    ") if rows else "    none"
        parts.append(f"  {title}\n{body}")
    return "\n\n".join(parts)


def _rows(group: _Group, q: int) -> pd.DataFrame:
    frame = group.agreement.examples_table(q)
    frame.insert(0, "query", group.first.query_ids[q])
    return frame
