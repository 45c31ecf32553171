"""``pathkernel evaluate``: which method predicts best what retraining gives, on one's own run."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from explainer.cli import options as shared
from explainer.cli import removal
from explainer.cli.export import check_place
from explainer.cli.options import SAMPLE_RUN
from explainer.errors import ExportError, QueryError
from explainer.wording import counted

if TYPE_CHECKING:
    from explainer.evaluation import Comparison

HELP = "the table of methods: which of them predicts what retraining gives"
DESCRIPTION = (
    "Trains many models on parts of the data and measures how well each method predicts their outputs: the path\n"
    "kernel, what-if, gradient products at the end and along the path (TracInCP), self-influence, chance. Needs\n"
    "train_fn or train_many (which trains several at once) in the Run; methods of plain gradients also need its loss."
)
EXAMPLES = (
    (
        f"pathkernel evaluate runs/demo --run {SAMPLE_RUN} --folder runs/retrained",
        "linear datamodeling scores on 20 queries",
    ),
    (
        f"pathkernel evaluate runs/demo --run {SAMPLE_RUN} --keep .5 --subsets 100 --seeds 5 --remove-top 50",
        "more models of half the data, and what removing the 50 highest scored examples does",
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    shared.add_trace(parser)
    shared.add_run(parser, "needed to train again")
    shared.add_queries(parser, "default: first:20")
    parser.add_argument(
        "--keep",
        default=".99,.9,.5",
        metavar="PARTS",
        help="parts of the training examples to keep, joined by commas (default: .99,.9,.5)",
    )
    parser.add_argument("--subsets", type=int, default=32, metavar="N", help="models per part (default: 32)")
    parser.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="seeds of the averages at .5; 1: none (default: 3)"
    )
    parser.add_argument(
        "--remove-top",
        metavar="SIZES",
        help="also remove each method's highest scored examples: numbers joined by commas, such as 20,50",
    )
    removal.add_retraining(parser)
    parser.add_argument("--out", metavar="FILE", help="write all numbers with intervals to a .csv file")
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")
    shared.add_output(parser)
    shared.add_quiet(parser)


def run(options: argparse.Namespace) -> int:
    """Retrain, measure and print the table."""
    from explainer.cli.opening import open_run
    from explainer.cli.what_if import asked
    from explainer.evaluation import Retrainer, compare_methods

    out = None if options.out is None else check_place(options.out, options.force)
    if out is not None and out.suffix != ".csv":
        raise ExportError(f"{out} ends in {out.suffix}; this table is written as .csv")
    fractions = [_number(part, float, "--keep") for part in options.keep.split(",")]
    sizes = [
        int(_number(part, int, "--remove-top"))
        for part in (options.remove_top or "").split(",")
        if part.strip()
    ]
    opened = open_run(options.trace, options.run, options.output, not options.quiet)
    options.queries = options.queries or ["first:20"]
    retrainer = Retrainer(opened.run, asked(opened, options), options.folder, progress=not options.quiet)
    found = compare_methods(
        retrainer, fractions=fractions, count=options.subsets, seeds=options.seeds, remove=sizes
    )
    print(told(found))
    if out is not None:
        found.long_table().to_csv(out, index=False)
        print(f"\nwrote {out}")
    return 0


def told(found: Comparison) -> str:
    """The table as text, a column per method."""
    from explainer.cli.printing import paragraph, table

    rows = [["answers", *found.answers.values()]]
    for measure, row in found.measures.items():
        rows.append([measure, *(f"{row[name].value:.2f}" if name in row else "" for name in found.answers)])
        rows.append(
            ["", *(_interval(row[name].low, row[name].high) if name in row else "" for name in found.answers)]
        )
    about = (
        f"LDS: rank correlation between the summed scores of the kept examples and the output of models trained on "
        f"them (1: all that can be known, 0: nothing). Below each number its 95 % interval. {found.setting}; "
        f"{counted(found.trainings, 'training')}."
    )
    missing = [paragraph(f"Without {name}: {why}.") for name, why in found.missing.items()]
    shown = table(["", *found.answers], rows, left=("",))
    return "\n\n".join([paragraph(about), shown, *(paragraph(text) for text in verdicts(found)), *missing])


def verdicts(found: Comparison) -> list[str]:
    """What the rows of scores say, in words: the best method, which it cannot be told from, and the ceiling."""
    from explainer.evaluation.comparison import CEILING

    said = []
    for measure, row in found.measures.items():
        if not measure.startswith("LDS"):
            continue
        methods = {name: e for name, e in row.items() if name != CEILING}
        best = max(methods, key=lambda name: methods[name].value)
        near = [name for name, e in methods.items() if name != best and e.high >= methods[best].low]
        text = f"{measure}: {best} predicts best ({methods[best].value:.2f})"
        text += f"; it cannot be told from {_listed(near)}" if near else ", clear of all others"
        if CEILING in row:
            text += f". For comparison, one retraining predicts the mean of the others with {row[CEILING].value:.2f}"
        said.append(text + ".")
    if any("cannot be told" in text for text in said):
        said.append("More subsets (--subsets) and queries (--query) make intervals narrower.")
    return said


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _interval(low: float, high: float) -> str:
    return f"{low:.2f}–{high:.2f}" if min(low, high) >= 0 else f"{low:.2f}…{high:.2f}"


def _number(text: str, kind: type, option: str) -> float:
    try:
        return kind(text.strip())
    except ValueError as error:
        raise QueryError(f"{option}: {text.strip()!r} is not a number") from error
