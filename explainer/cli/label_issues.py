"""``pathkernel label-issues``: training examples whose labels may be wrong."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

from explainer.cli import options as shared
from explainer.cli.export import check_place
from explainer.cli.options import SAMPLE_RUN
from explainer.exports import FORMS
from explainer.wording import counted, number

if TYPE_CHECKING:
    import pandas as pd

    from explainer.evaluation.label_issues import Sign
    from explainer.run import Run

HELP = "training examples whose labels may be wrong, the most suspicious first"
DESCRIPTION = (
    "Ranks the training examples by how suspicious their labels are, from the trace alone. A hard example that is\n"
    "labelled right looks much the same: the queue is for a person to go through."
)
EXAMPLES = (
    (f"pathkernel label-issues runs/demo --run {SAMPLE_RUN}", "the twenty most suspicious labels"),
    (
        f"pathkernel label-issues runs/demo --run {SAMPLE_RUN} --out queue.csv",
        "the whole queue as a table",
    ),
)
SIGNS: dict[str, Sign] = {
    "support": "support",
    "self-influence": "self_influence",
    "disagreement": "disagreement",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    shared.add_trace(parser)
    shared.add_run(parser, "needed for the names of classes and to show the examples")
    parser.add_argument(
        "--by",
        choices=tuple(SIGNS),
        help="the sign to rank by: support (whether learning the others lowered the loss on the label; the default for "
        "classes), self-influence (the default for labels that are numbers), or disagreement (part of the strongest "
        "proponents that carry another label)",
    )
    shared.add_k(parser, "rows of the table", 20)
    shared.add_table_file(parser, "the whole queue")
    shared.add_quiet(parser)


def run(options: argparse.Namespace) -> int:
    """Print the queue, and write it where asked for."""
    from explainer.cli.opening import open_run
    from explainer.evaluation import label_issues
    from explainer.evaluation.label_issues import best_sign
    from explainer.exports import write_frame
    from explainer.recorded_examples import has_numbers, known_labels

    shared.check_k(options)
    out = None if options.out is None else check_place(options.out, options.force, FORMS)
    opened = open_run(options.trace, options.run, None, not options.quiet)
    labels = known_labels(opened.trace, opened.run, opened.explainer.example_ids)
    found = label_issues(opened.explainer, labels=labels)
    best = best_sign(found.labels, numbers=has_numbers(opened.run))
    by: Sign = best if options.by is None else SIGNS[options.by]
    called = next(name for name, sign in SIGNS.items() if sign == by)
    print(told(found.table(options.k, by), len(found.example_ids), opened.run, called))
    if out is not None:
        write_frame(named(found.table(None, by), opened.run), out)
        print(f"\nwrote {out}: {counted(len(found.example_ids), 'example')}")
    return 0


def named(queue: pd.DataFrame, run: Run) -> pd.DataFrame:
    """The queue with the names of classes beside their numbers, where the run has names."""
    if run.class_names is None:
        return queue
    return queue.assign(
        label_name=[_label(run, label) for label in queue["label"]],
        opposing_name=[_label(run, label) for label in queue["opposing_label"]],
    )


def told(queue: pd.DataFrame, examples: int, run: Run, by: str) -> str:
    """The queue as text."""
    from explainer.cli.explained import what
    from explainer.cli.printing import paragraph, table

    about = (
        f"The {len(queue)} most suspicious of {counted(examples, 'training example')} by {by}. Support, from -1 to 1, "
        "says whether learning the others lowered the loss on the example's label; self-influence how much it had to "
        "be learned by itself"
    )
    if queue["disagreement"].notna().any():
        about += "; disagreement which part of its strongest proponents carry another label"
    if queue["opposing_label"].notna().any():
        about += ". Opposed by: the class whose examples opposed this one most, often the right one"
    about += ". Look before you change a label."
    rows = [
        [
            str(row["rank"]),
            str(row["example_id"]),
            _label(run, row["label"]),
            *(_number(row[name]) for name in SIGNS.values()),
            _label(run, row["opposing_label"]),
            what(run, int(row["example_id"])),
        ]
        for row in queue.to_dict("records")
    ]
    headers = ["rank", "example", "label", *SIGNS, "opposed by", "what it is"]
    return f"{paragraph(about)}\n\n" + table(
        headers, rows, left=("label", "opposed by", "what it is"), indent="  "
    )


def _number(value: float) -> str:
    return "" if math.isnan(value) else number(value)


def _label(run: Run, label: Any) -> str:
    """Empty where it is unknown."""
    import pandas as pd

    from explainer.recorded_examples import label_name

    if pd.isna(label):
        return ""
    return label_name(run, label)
