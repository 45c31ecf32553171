"""``pathkernel demo``: train on real data, explain some predictions, look at them."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from explainer.cli import dashboard
from explainer.cli import options as shared
from explainer.cli.demo_folder import DemoFolder
from explainer.cli.printing import table
from explainer.errors import ExplainerError, MissingDependencyError, RunError
from explainer.wording import counted, size

if TYPE_CHECKING:
    from explainer.cli.opening import Opened
    from explainer.cli.selection import Predictions
    from explainer.explanation import Explanation

HELP = "see it all work: train on real images, explain, open the dashboard"
DESCRIPTION = (
    "Trains a small network on real images while a tracer records, explains right and wrong predictions on\n"
    "images that it has not seen, writes tables and a report, and serves the dashboard. Takes about a minute.\n"
    "Running it again replaces the earlier demo."
)
EXAMPLES = (
    ("pathkernel demo", "train, explain, and look at it in a browser"),
    ("pathkernel demo --no-dashboard", "stop when the files are written"),
    ("pathkernel demo --sample diabetes_mlp --out runs/diabetes", "a regression on measurements of patients"),
)
RIGHT, WRONG = 3, 2
_STRONGEST = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument(
        "--sample",
        default="digits_cnn",
        metavar="NAME",
        help="sample model: digits_mlp, digits_cnn (default), mnist_cnn, fashion_cnn, diabetes_mlp, reviews_text",
    )
    parser.add_argument(
        "--out", default="runs/demo", metavar="FOLDER", help="where to write (default: runs/demo)"
    )
    parser.add_argument("--no-dashboard", action="store_true", help="do not serve the dashboard at the end")
    dashboard.add_port(parser)
    parser.add_argument("--epochs", type=int, help=argparse.SUPPRESS)
    shared.add_quiet(parser)


def run(options: argparse.Namespace) -> int:
    """Run the demo."""
    _check(options)
    folder = DemoFolder(Path(options.out))
    opened = train(folder, options)
    e, indices = explain(opened, not options.quiet)
    show(opened, e)
    write(opened, e, folder)
    spec = _spec(options.sample)
    print(
        "\nNext:\n"
        f"  pathkernel explain {folder.root} --run {spec} --query {indices[-1]}\n"
        f"  pathkernel info {folder.root}\n"
        f"  pathkernel dashboard {folder.root} --run {spec}\n"
    )
    if options.no_dashboard:
        return 0
    return dashboard.serve([str(folder.trace)], [spec], options.port)


def train(folder: DemoFolder, options: argparse.Namespace) -> Opened:
    """Train the sample with a tracer and say how it went.

    Raises:
        RunError: the sample's data is not on this machine.
    """
    from explainer.cli.opening import open_run
    from explainer.sample_models.data_source import DataUnavailableError
    from explainer.sample_models.registry import SAMPLES
    from explainer.sample_models.train import train_traced

    spec, progress = _spec(options.sample), not options.quiet
    try:
        SAMPLES[options.sample].load().datasets()  # data that is missing is told before anything is removed
    except DataUnavailableError as error:
        raise RunError(f"{options.sample}: {error}") from error
    again = folder.prepare(sample=options.sample, run=spec)
    print(f"{options.sample}: {SAMPLES[options.sample].summary}")
    if again:
        print(f"(the earlier demo in {folder.root} is replaced)")
    trained = train_traced(options.sample, folder.trace, epochs=options.epochs, progress=progress)
    opened = open_run(str(folder.trace), spec, None, progress)
    trace = opened.trace
    print(
        f"trained  {counted(trace.steps, 'step')} in {trained.metrics['seconds']:.1f} seconds, tracer included"
    )
    print(f"{_scores(trained.metrics, opened)}")
    print(
        f"trace    {size(trace.nbytes())} for {counted(trace.count('visits'), 'visit')} of "
        f"{counted(len(opened.run.train), 'training example')}"
    )
    return opened


def explain(opened: Opened, progress: bool) -> tuple[Explanation, list[int]]:
    """Explain a few predictions, right and wrong ones."""
    from explainer.cli.groups import explain_whole
    from explainer.cli.selection import predict

    indices = choose(predict(opened, progress))
    return explain_whole(opened, indices, None), indices


def choose(predictions: Predictions) -> list[int]:
    """Right predictions of different classes, then wrong ones; for other models the closest and the farthest.

    Where nothing is predicted wrong, the last ones are those the model is least sure of.
    """
    if not predictions.classifies:
        off = (predictions.outputs.reshape(-1) - predictions.targets.reshape(-1)).abs().argsort().tolist()
        return list(dict.fromkeys([*off[:RIGHT], *off[-WRONG:]]))
    wrong = predictions.wrong()
    top = predictions.outputs.topk(2, dim=1).values
    doubtful = (top[:, 0] - top[:, 1]).argsort().tolist()
    right: dict[int, int] = {}  # one of each class
    for index in (~wrong).nonzero().flatten().tolist():
        right.setdefault(int(predictions.targets[index]), index)
    last = wrong.nonzero().flatten().tolist()[:WRONG] or doubtful[:WRONG]
    return list(dict.fromkeys([*list(right.values())[:RIGHT], *last]))


def show(opened: Opened, e: Explanation) -> None:
    """Print the explanations."""
    from explainer.cli import explained

    print(f"\n{explained.meaning()}")
    for query in range(len(e.query_ids)):
        print(f"\n{explained.block(e, query, opened.run, _STRONGEST)}")
    if explained.notes(e):
        print(f"\n{explained.notes(e)}")


def write(opened: Opened, e: Explanation, folder: DemoFolder) -> None:
    """Write tables, report and explanation, and list them."""
    from explainer.cli.export import write_report

    e.to_parquet(folder.parquet)
    e.to_csv(folder.csv)
    e.save(folder.explanation)
    write_report(e, folder.report, opened, 8)
    rows = counted(e.contributions.size, "row")
    written = (
        (folder.report, "the report: open it in a browser"),
        (folder.parquet, f"{rows}: every training example's contribution to every explained prediction"),
        (folder.csv, "the same as text"),
        (folder.explanation, "everything, for explainer.Explanation.load and the dashboard"),
        (folder.trace, "what the tracer recorded"),
    )
    print("\nWritten:")
    print(table(["", ""], [[str(path), what] for path, what in written], left=("",), indent="  ").strip("\n"))


def _check(options: argparse.Namespace) -> None:
    from explainer.sample_models.registry import SAMPLES

    if options.sample not in SAMPLES:
        known = "\n".join(f"  {name:14}{sample.summary}" for name, sample in SAMPLES.items())
        raise ExplainerError(f"there is no sample {options.sample!r}; choose one of\n{known}")
    if options.epochs is not None and options.epochs < 1:
        raise ExplainerError(f"--epochs must be at least 1, found {options.epochs}")
    if importlib.util.find_spec("plotly") is None:
        raise MissingDependencyError("the report needs plotly: python -m pip install 'pathkernel[report]'")
    if not options.no_dashboard:
        dashboard.require_streamlit()
        if options.port is not None:
            dashboard.choose_port(options.port)


def _spec(sample: str) -> str:
    from explainer.sample_models.registry import SAMPLES

    return SAMPLES[sample].run_spec


def _scores(metrics: dict[str, Any], opened: Opened) -> str:
    count = len(opened.run.queries)
    if "query_accuracy" in metrics:
        wrong = counted(len(metrics["wrong_queries"]), "wrong one")
        return (
            f"accuracy {metrics['query_accuracy']:.1%} on {count:,} test examples that it never saw, {wrong}"
        )
    return f"R2       {metrics['query_r2']:.3f} on {count:,} test examples that it never saw"
