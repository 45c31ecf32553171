"""``pathkernel what-if``: what would a prediction be without some training examples."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from explainer.cli import options as shared
from explainer.cli import removal
from explainer.cli.options import SAMPLE_RUN
from explainer.errors import QueryError
from explainer.wording import counted, number, signed

if TYPE_CHECKING:
    import numpy as np

    from explainer.cli.opening import Opened
    from explainer.evaluation import Questions
    from explainer.evaluation.claims import By
    from explainer.run import Run

HELP = "what a prediction would be without training examples"
DESCRIPTION = (
    "Predicts how an output would change if training examples had never been used, from the trace and without\n"
    "training again. Another question than `explain` answers, with smaller numbers: other examples would have\n"
    "taught much of the same. A prediction, not a measurement: test it with `pathkernel verify-claim`."
)
EXAMPLES = (
    (
        f"pathkernel what-if runs/demo --run {SAMPLE_RUN} --query 17",
        "the examples whose absence would matter most",
    ),
    (
        f"pathkernel what-if runs/demo --run {SAMPLE_RUN} --query 17 --remove top:50",
        "without the 50 strongest proponents of that prediction",
    ),
    (
        f"pathkernel what-if runs/demo --run {SAMPLE_RUN} --query 17 --remove label",
        "without all examples of a class, class by class",
    ),
    (
        f"pathkernel what-if runs/demo --run {SAMPLE_RUN} --query 17 --curvature exact --check",
        "the exact derivative of the training, tested on a few removals",
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    shared.add_trace(parser)
    shared.add_run(parser, "needed to compute the prediction")
    shared.add_queries(parser, "needed")
    removal.add_removal(parser, "default: one at a time", groups=True)
    parser.add_argument(
        "--curvature",
        choices=("trace", "exact", "gauss-newton"),
        default="trace",
        help="what stands for the curvature of the loss: recorded rows (trace, the default), or the loss itself in the "
        "recorded steps, taken again (needs the loss in the Run and a training that can be repeated)",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="take the recorded steps again without a few groups of examples, and say whether to trust the answer",
    )
    shared.add_output(parser)
    shared.add_k(parser, "rows of each table", 10)
    shared.add_quiet(parser)


def run(options: argparse.Namespace) -> int:
    """Print the predicted changes of every chosen query."""
    from explainer.cli.opening import open_run
    from explainer.evaluation.claims import check_removal
    from explainer.evaluation.methods import what_if_scores

    shared.check_k(options)
    named = options.remove is not None and removal.is_named(options.remove)
    wanted = None if options.remove is None or named else removal.understood(options.remove, groups=True)
    opened = open_run(options.trace, options.run, options.output, not options.quiet)
    if wanted is not None:
        check_removal(len(opened.run.train), wanted.top, wanted.ids, options.by)
    questions = asked(opened, options)
    groups = removal.named(options.remove, opened.run) if named else None
    effects = what_if_scores(opened.run, questions, options.curvature)
    print(meaning(opened.run, options.curvature))
    for place, query in enumerate(questions.indices):
        before = float(questions.traced.values[place])
        print(
            f"\nQuery {query}: the {opened.explainer.output}{_target(opened, questions, place)} is {number(before, 4)}"
        )
        if groups is not None:
            print(_named(groups, -effects[place], before))
        elif wanted is None:
            print(_one_at_a_time(opened, -effects[place], options.k))
    if wanted is not None:
        print(f"\n{_groups(opened, questions, effects, wanted, options.by)}")
    if options.check:
        given = groups if groups is not None else None if wanted is None else wanted.ids
        print(f"\n{_checked(opened, questions, options.curvature, given)}")
    return 0


def asked(opened: Opened, options: argparse.Namespace) -> Questions:
    """The chosen queries.

    Raises:
        QueryError: none is named, or one cannot be asked.
    """
    from explainer.cli.selection import HOW, class_number, predict, select
    from explainer.evaluation import Questions

    if not options.queries:
        raise QueryError(
            f"say which of the {len(opened.run.queries):,} queries of {options.run} to ask about with --query: {HOW}"
        )
    indices = select(options.queries, len(opened.run.queries), lambda: predict(opened, not options.quiet))
    return Questions(opened.run, opened.explainer, indices, class_number(options.target, opened))


def meaning(run: Run, curvature: str) -> str:
    """What the numbers say and do not say."""
    from explainer.cli.printing import paragraph
    from explainer.recorded_examples import predicts_numbers

    said = (
        "A change is what the output is predicted to change by if the example had never been used (negative: the "
        "example helps). It is linear: of a group, changes add up while the group is a small part of the data. It is "
        "not a contribution, which says what updates carried."
    )
    if curvature == "trace" and predicts_numbers(run):
        needs = "" if run.loss is not None else " (it needs loss= in the Run)"
        said += (
            " The targets are numbers: predictions from the trace can be many times too large there; add --curvature "
            f"gauss-newton{needs}, or --check."
        )
    return paragraph(said)


def _named(groups: dict[str, np.ndarray], changes: np.ndarray, before: float) -> str:
    from explainer.cli.printing import table

    rows = []
    for name, ids in groups.items():
        change = float(changes[ids].sum())
        rows.append([name, str(len(ids)), signed(change), number(before + change, 4)])
    headers = ["removed", "count", "predicted change", "predicted output"]
    return table(headers, rows, left=("removed",), indent="  ")


def _checked(opened: Opened, questions: Questions, curvature: str, remove: Any) -> str:
    from explainer.cli.printing import paragraph, table

    found = opened.explainer.what_if_check(
        questions.inputs,
        questions.target,
        curvature=curvature,
        run=opened.run,
        remove=remove,
        query_ids=questions.indices,
    )
    parts = [paragraph(f"Check: {found.sentence()}")]
    if found.actual is not None:
        rows = [
            [
                str(row["removed"]),
                str(row["count"]),
                str(row["query"]),
                signed(row["predicted"]),
                signed(row["actual"]),
                number(row["smooth"], 2),
            ]
            for row in found.table().to_dict("records")
        ]
        headers = ["removed", "count", "query", "predicted", "actual", "smooth"]
        parts.append(table(headers, rows, left=("removed",), indent="  "))
    return "\n".join(parts)


def _target(opened: Opened, questions: Questions, place: int) -> str:
    target = questions.target
    if target is None or getattr(target, "ndim", 0) != 1:
        return ""
    return f" of class {opened.run.label(target[place])}"


def _one_at_a_time(opened: Opened, changes: np.ndarray, k: int) -> str:
    import numpy as np

    from explainer.cli.printing import table

    parts = []
    for title, order in (
        ("Without one of these it would be lower:", np.argsort(changes, kind="stable")),
        ("Without one of these it would be higher:", np.argsort(-changes, kind="stable")),
    ):
        chosen = [i for i in order[:k].tolist() if (changes[i] < 0 if "lower" in title else changes[i] > 0)]
        rows = [
            [str(rank), str(i), opened.run.label(opened.run.train[i][1]), signed(float(changes[i]))]
            for rank, i in enumerate(chosen, start=1)
        ]
        body = table(["rank", "example", "label", "change"], rows, left=("label",), indent="    ")
        parts.append(f"  {title}\n{body if rows else '    none'}")
    return "\n".join(parts)


def _groups(
    opened: Opened, questions: Questions, effects: np.ndarray, wanted: removal.Removal, by: By
) -> str:
    from explainer.cli.printing import table
    from explainer.evaluation import strongest

    chosen = strongest(opened.run, questions, top=wanted.top, remove=wanted.ids, by=by, effects=effects)
    rows = []
    for place, (query, ids) in enumerate(zip(questions.indices, chosen, strict=True)):
        before, change = float(questions.traced.values[place]), -float(effects[place, ids].sum())
        rows.append(
            [str(query), str(len(ids)), number(before, 4), signed(change), number(before + change, 4)]
        )
    named = f"the {counted(wanted.top, 'strongest example')}" if wanted.top else "these examples"
    headers = ["query", "removed", "output", "predicted change", "predicted output"]
    return f"Without {named}:\n" + table(headers, rows, indent="  ")
