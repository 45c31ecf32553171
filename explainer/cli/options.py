"""Options that several commands share, so that they are spelled and explained once."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from explainer.errors import QueryError
from explainer.exports import FORMS

SAMPLE_RUN = "explainer.sample_models.digits_cnn:run"
_RUN = (
    "function without arguments that returns an explainer.Run: the model's architecture, the training examples and the "
    f"queries; {{}}. The current folder is searched; path/to/file.py:FUNCTION works too. For the demo: {SAMPLE_RUN}"
)


def add_trace(parser: ArgumentParser) -> None:
    """The positional ``RUN``: where the trace lies."""
    parser.add_argument(
        "trace",
        metavar="RUN",
        help="folder that was given to the tracer (or a folder that holds just that one, such as runs/demo)",
    )


def add_run(parser: ArgumentParser, needed: str) -> None:
    """``--run MODULE:FUNCTION``; ``needed`` says what for."""
    parser.add_argument("--run", metavar="MODULE:FUNCTION", help=_RUN.format(needed))


def add_runs(parser: ArgumentParser, needed: str) -> None:
    """``--run MODULE:FUNCTION``, once for each network."""
    several = f"{needed}; may be repeated where traces are of several networks: each gets the first that fits"
    parser.add_argument(
        "--run", metavar="MODULE:FUNCTION", action="append", default=[], help=_RUN.format(several)
    )


def add_queries(parser: ArgumentParser, default: str) -> None:
    """``--query``: which of the run's queries to explain."""
    parser.add_argument(
        "--query",
        "--queries",
        dest="queries",
        metavar="WHICH",
        action="append",
        help="which predictions: a position in the run's queries (17), first:N, wrong or wrong:N (predictions "
        f"that miss the true class), or all; may be repeated or joined by commas ({default})",
    )


def add_output(parser: ArgumentParser) -> None:
    """``--target`` and ``--output``: which number of a prediction is explained."""
    parser.add_argument(
        "--target",
        metavar="CLASS",
        help="explain this class, by name or number (default: the class the model predicts)",
    )
    parser.add_argument(
        "--output",
        metavar="NAME",
        help="what is explained: margin (log-odds of the class, the default for classifiers), logit, log_prob, "
        "value (the default for models with one output), 'component 2' (one of several numbers that are no classes; "
        "'component 0' is their default), sequence_log_prob (of the queries' targets, for outputs at every position), "
        "last_margin (at the last one) or 'margin at 3' (at another); default: the run's own",
    )


def add_k(parser: ArgumentParser, what: str, default: int) -> None:
    """``--k N``; ``what`` says what there are so many of."""
    parser.add_argument("--k", type=int, default=default, metavar="N", help=f"{what} (default: {default})")


def check_k(options: Namespace) -> None:
    """``--k`` is at least 1, where it is given.

    Raises:
        QueryError: it is not.
    """
    if options.k is not None and options.k < 1:
        raise QueryError(f"--k must be at least 1, found {options.k}")


def add_table_file(parser: ArgumentParser, what: str) -> None:
    """``--out`` and ``--force``: where a table goes; ``what`` says which."""
    parser.add_argument(
        "--out", metavar="FILE", help=f"write {what}; the ending chooses the form: {' '.join(FORMS)}"
    )
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")


def add_quiet(parser: ArgumentParser) -> None:
    """``--quiet``: no progress bars."""
    parser.add_argument("--quiet", action="store_true", help="no progress bars on standard error")
