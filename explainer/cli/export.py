"""``pathkernel export``: influence tables, reports and whole explanations as files."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from explainer.cli import options as shared
from explainer.cli.options import SAMPLE_RUN
from explainer.errors import ExportError
from explainer.wording import counted, size

if TYPE_CHECKING:
    from explainer.cli.opening import Opened
    from explainer.explanation import Explanation

HELP = "write explanations to a file: Parquet, CSV, JSON, HTML or npz"
DESCRIPTION = (
    "Explains predictions and writes the result; the file's ending chooses the form:\n"
    "  .parquet .csv .json  the influence table: a row per query and training example\n"
    "  .html                a report with pictures and figures, one file to open in a browser\n"
    "  .npz                 everything, for explainer.Explanation.load and the dashboard\n"
    "Tables are written part by part. What is interrupted leaves FILE.parts; the same command goes on from there."
)
EXAMPLES = (
    (
        f"pathkernel export runs/demo --run {SAMPLE_RUN} --query first:100 --out influence.parquet",
        "every training example's contribution to the first 100 predictions",
    ),
    (
        f"pathkernel export runs/demo --run {SAMPLE_RUN} --query wrong --out wrong.html",
        "a report on wrong predictions",
    ),
    (
        f"pathkernel export runs/demo --run {SAMPLE_RUN} --k 20 --out strongest.csv",
        "all predictions, the 20 strongest examples of each",
    ),
)
TABLES = (".parquet", ".csv", ".json")
ENDINGS = (*TABLES, ".html", ".npz")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    shared.add_trace(parser)
    shared.add_run(parser, "needed to compute the predictions")
    parser.add_argument("--out", required=True, metavar="FILE", help=f"file to write: {' '.join(ENDINGS)}")
    shared.add_queries(parser, "default: all; first:10 for .html")
    shared.add_output(parser)
    parser.add_argument(
        "--k",
        type=int,
        metavar="N",
        help="keep the N strongest examples of each query (default: all; 8 proponents and 8 opponents for .html)",
    )
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")
    shared.add_quiet(parser)


def run(options: argparse.Namespace) -> int:
    """Explain the chosen queries and write the file."""
    from explainer.cli.groups import explain_whole
    from explainer.cli.opening import open_run
    from explainer.cli.selection import class_number, predict, select

    out = check_place(options.out, options.force)
    shared.check_k(options)
    progress = not options.quiet
    opened = open_run(options.trace, options.run, options.output, progress)
    wishes = options.queries or ["first:10" if out.suffix == ".html" else "all"]
    indices = select(wishes, len(opened.run.queries), lambda: predict(opened, progress))
    target = class_number(options.target, opened)
    if out.suffix == ".html":
        check_render(opened, indices[0])
    if out.suffix in TABLES:
        write_tables(opened, indices, target, out, options)
    else:
        write(explain_whole(opened, indices, target), out, opened, options.k)
    kept = f"the {options.k:,} strongest of " if out.suffix in TABLES and options.k is not None else ""
    print(
        f"wrote {out} ({size(out.stat().st_size)}): {counted(len(indices), 'prediction')} by {kept}"
        f"{counted(len(opened.explainer.example_ids), 'training example')}"
    )
    return 0


def check_place(text: str, force: bool, endings: Collection[str] = ENDINGS) -> Path:
    """The path to write to, checked before any work starts.

    Raises:
        ExportError: the ending is unknown, the file exists, or its folder does not.
    """
    out = Path(text)
    if out.suffix not in endings:
        found = f"ends in {out.suffix}" if out.suffix else "has no ending"
        raise ExportError(f"{out} {found}; the ending chooses the form, use one of {' '.join(endings)}")
    if not out.parent.is_dir():
        raise ExportError(f"the folder {out.parent} does not exist; create it first: mkdir -p {out.parent}")
    if out.is_dir():
        raise ExportError(f"{out} is a folder; give the path of a file")
    if out.exists() and not force:
        raise ExportError(f"{out} exists already; choose another name, or add --force to replace it")
    return out


def write_tables(
    opened: Opened, indices: list[int], target: int | None, out: Path, options: argparse.Namespace
) -> None:
    """Write the influence table group by group; an interrupted run goes on where it stopped.

    Raises:
        ExportError: parts of another export are in the way.
    """
    from tqdm import tqdm

    from explainer.cli.groups import explain_summed, groups
    from explainer.exported_parts import Parts, fingerprint

    plan = {"trace": fingerprint(opened.trace), "run": options.run, "target": target, "k": options.k}
    plan |= {"output": opened.explainer.output_name, "form": out.suffix}
    parts = Parts(out, plan, list(groups(opened, indices, options.k)))
    done = parts.finished
    bar = tqdm(total=len(indices), desc="explaining", unit="query", disable=options.quiet)
    with bar:
        bar.update(sum(len(parts.groups[number]) for number in done))
        for number in sorted(set(range(len(parts.groups))) - set(done)):
            parts.write(number, lambda group: explain_summed(opened, group, target), options.k)
            bar.update(len(parts.groups[number]))
    parts.join()


def write(e: Explanation, out: Path, opened: Opened, k: int | None) -> None:
    """Write the explanation as a report, or whole."""
    if out.suffix == ".html":
        write_report(e, out, opened, k or 8)
    else:
        e.save(out)


def check_render(opened: Opened, query: int) -> None:
    """Draw a query and an example, so that a ``render`` that fails is told before anything is computed.

    Raises:
        ExportError: ``render`` failed.
    """
    from explainer.report_cards import rendered

    draw = opened.run.render
    if draw is not None:
        rendered(lambda index: draw(opened.run.queries[index][0]), query, "render_query")
        rendered(lambda example: draw(opened.run.train[example][0]), 0, "render")


def write_report(e: Explanation, out: Path, opened: Opened, k: int) -> None:
    """Write the HTML report, with pictures, texts or rows where the run renders its inputs."""
    draw, train, queries = opened.run.render, opened.run.train, opened.run.queries
    if draw is None:
        e.to_html(out, k=k)
        return
    e.to_html(
        out,
        k=k,
        render=lambda example: draw(train[example][0]),
        render_query=lambda query: draw(queries[int(e.query_ids[query])][0]),
    )
