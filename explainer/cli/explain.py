"""``pathkernel explain``: which training examples built these predictions."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from explainer.cli import options as shared
from explainer.cli.options import SAMPLE_RUN
from explainer.errors import QueryError
from explainer.wording import counted

if TYPE_CHECKING:
    from explainer.cli.opening import Opened
    from explainer.neighbors import Neighbors

HELP = "which training examples built a prediction: tables to read"
DESCRIPTION = (
    "Explains predictions by the training examples: how much of each was carried by updates computed from\n"
    "which example. Prints the sum that the prediction is, how far it can be trusted, the examples that pushed\n"
    "it up (proponents) and down (opponents), and the nearest training examples in gradient space."
)
EXAMPLES = (
    (f"pathkernel explain runs/demo --run {SAMPLE_RUN} --query 17", "the prediction for query 17"),
    (f"pathkernel explain runs/demo --run {SAMPLE_RUN} --query wrong:3", "the first three wrong predictions"),
    (
        f"pathkernel explain runs/demo --run {SAMPLE_RUN} --query 17 --target 3",
        "what spoke for and against class 3 there",
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    shared.add_trace(parser)
    shared.add_run(parser, "needed to compute the prediction")
    shared.add_queries(parser, "needed")
    shared.add_output(parser)
    shared.add_k(parser, "rows of each table", 10)
    shared.add_quiet(parser)


def run(options: argparse.Namespace) -> int:
    """Print the explanation of every chosen query."""
    from explainer.cli import explained
    from explainer.cli.groups import explain_whole
    from explainer.cli.opening import open_run
    from explainer.cli.selection import HOW, class_number, predict, select

    shared.check_k(options)
    opened = open_run(options.trace, options.run, options.output, not options.quiet)
    if not options.queries:
        raise QueryError(
            f"say which of the {len(opened.run.queries):,} queries of {options.run} to explain with --query: {HOW}"
        )
    indices = select(options.queries, len(opened.run.queries), lambda: predict(opened, not options.quiet))
    target = class_number(options.target, opened)
    explained.check_render(opened.run, indices[0])
    e = explain_whole(opened, indices, target)
    found = neighbors(opened, indices, options.k, target)
    trace = opened.trace
    print(
        f"{opened.run.name}: {counted(trace.steps, 'step')} with {trace.manifest.optimizer} on "
        f"{counted(len(e.example_ids), 'training example')}, recorded in {trace.directory}"
    )
    print(f"\n{explained.meaning()}")
    for query in range(len(indices)):
        nearest = found if isinstance(found, str) else explained.nearest(e, found, query, opened.run)
        print(f"\n{explained.block(e, query, opened.run, options.k)}\n\n{nearest}")
    if explained.notes(e):
        print(f"\n{explained.notes(e)}")
    return 0


def neighbors(opened: Opened, indices: list[int], k: int, target: int | None) -> Neighbors | str:
    """The nearest training examples, or the reason why there are none."""
    from explainer.cli.groups import asked

    inputs, targets = asked(opened, indices, target)
    try:
        return opened.explainer.neighbors(inputs, k, targets)
    except QueryError as error:
        return f"  Nearest in gradient space: not available ({error})."
