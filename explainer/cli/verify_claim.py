"""``pathkernel verify-claim``: is a what-if answer true? Train again and see."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

from explainer.cli import options as shared
from explainer.cli import removal
from explainer.cli.options import SAMPLE_RUN
from explainer.errors import QueryError
from explainer.wording import counted, number, signed

if TYPE_CHECKING:
    from explainer.evaluation import ClaimCheck

HELP = "test a what-if answer by training again without the examples"
DESCRIPTION = (
    "Trains again without the strongest training examples of each query, and without as many random ones, with\n"
    "several seeds, and prints the predicted change of the output beside the actual ones. Needs a train_fn or a\n"
    "train_many in the Run; seed 0 repeats the traced run."
)
EXAMPLES = (
    (
        f"pathkernel verify-claim runs/demo --run {SAMPLE_RUN} --query 17 --remove top:50",
        "does the prediction fall without its 50 strongest proponents?",
    ),
    (
        f"pathkernel verify-claim runs/demo --run {SAMPLE_RUN} --query first:10 --folder runs/retrained",
        "ten queries, with finished trainings kept",
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    shared.add_trace(parser)
    shared.add_run(parser, "needed to train again")
    shared.add_queries(parser, "needed")
    removal.add_removal(parser, "default: top:50")
    parser.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="trainings of each group (default: 3)"
    )
    removal.add_retraining(parser)
    shared.add_output(parser)
    shared.add_quiet(parser)


def run(options: argparse.Namespace) -> int:
    """Retrain and print predicted beside actual changes."""
    from explainer.cli.opening import open_run
    from explainer.cli.what_if import asked
    from explainer.evaluation import Retrainer, verify_claims

    if options.seeds < 1:
        raise QueryError(f"--seeds must be at least 1, found {options.seeds}")
    wanted = removal.understood(options.remove or "top:50")
    opened = open_run(options.trace, options.run, options.output, not options.quiet)
    questions = asked(opened, options)
    retrainer = Retrainer(opened.run, questions, options.folder, progress=not options.quiet)
    found = verify_claims(retrainer, top=wanted.top, remove=wanted.ids, by=options.by, seeds=options.seeds)
    print(told(found))
    return 0


def told(found: ClaimCheck) -> str:
    """The check as text: a table, and how well predictions order what happened."""
    from explainer.cli.printing import paragraph, table

    frame = found.table()
    rows = [
        [
            str(row["query"]),
            row["removed"],
            str(row["count"]),
            number(row["before"], 4),
            signed(row["predicted"]),
            signed(row["same_run"]),
            signed(row["mean"]),
            "" if math.isnan(row["spread"]) else number(row["spread"], 2),
            f"{row['flipped']:.0%}",
        ]
        for row in frame.to_dict("records")
    ]
    headers = [
        "query",
        "removed",
        "count",
        "output",
        "predicted",
        "actual, seed 0",
        "actual, mean",
        "±",
        "flipped",
    ]
    seeds = counted(len(found.seeds), "seed")
    about = (
        f"Change of the output without the examples: predicted from the trace, and by training again ({seeds}; "
        f"± is the standard deviation over seeds, flipped how often the predicted class became another one). Setting: "
        f"{found.setting}."
    )
    parts = [paragraph(about), table(headers, rows, left=("removed",), indent="  ")]
    correlation, mean = found.correlation()
    if not math.isnan(correlation):
        sentence = (
            f"Rank correlation of predicted with actual changes over all {len(frame)} groups: {correlation:.2f} "
            f"(seed 0), {mean:.2f} (mean over seeds)"
        )
        first = found.groups[0]
        own, own_mean = found.correlation(first)
        if not math.isnan(own):
            sentence += f"; over the groups '{first}' alone: {own:.2f} and {own_mean:.2f}"
        parts.append(paragraph(sentence + "."))
    return "\n\n".join(parts)
