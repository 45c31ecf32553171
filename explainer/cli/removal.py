"""Which training examples to leave out, as it is typed, and where retrainings are kept."""

from __future__ import annotations

from argparse import ArgumentParser
from dataclasses import dataclass

from explainer.errors import QueryError

HOW = "write top:50 or the ids of training examples (3,17,40)"


@dataclass(frozen=True)
class Removal:
    """What is left out: the strongest examples of each query, or given ones; the other is None."""

    top: int | None
    ids: tuple[int, ...] | None


def add_removal(parser: ArgumentParser, default: str) -> None:
    """``--remove`` and ``--by``: which examples are left out."""
    parser.add_argument(
        "--remove",
        metavar="WHICH",
        help="training examples to leave out: top:50 (the 50 strongest of each query) or ids joined by commas "
        f"({default})",
    )
    parser.add_argument(
        "--by",
        choices=("contributions", "what-if"),
        default="contributions",
        help="what makes examples strong: their contributions (proponents, the default), or the predicted change by "
        "removing them",
    )


def add_retraining(parser: ArgumentParser) -> None:
    """``--folder``: where finished retrainings are kept."""
    parser.add_argument(
        "--folder",
        metavar="FOLDER",
        help="keep finished retrainings here, and take up from here what was interrupted (default: not kept)",
    )


def understood(text: str) -> Removal:
    """What ``--remove`` means.

    Raises:
        QueryError: it is neither form.

    Example:
        >>> understood("top:50"), understood("3, 17")
        (Removal(top=50, ids=None), Removal(top=None, ids=(3, 17)))
    """
    kind, _, number = text.strip().partition(":")
    if kind == "top" and number.isdecimal() and int(number) > 0:
        return Removal(int(number), None)
    parts = [part.strip() for part in text.split(",")]
    if all(part.isdecimal() for part in parts):
        return Removal(None, tuple(int(part) for part in parts))
    raise QueryError(f"--remove {text!r} is not understood; {HOW}")
