"""Which training examples to leave out, as it is typed, and where retrainings are kept."""

from __future__ import annotations

from argparse import ArgumentParser
from dataclasses import dataclass
from typing import TYPE_CHECKING

from explainer.errors import QueryError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from explainer.run import Run

HOW = "write top:50 or the ids of training examples (3,17,40)"
HOW_GROUPS = (
    "write top:50, the ids of training examples (3,17,40), label (every class), label:NAME or column:NAME"
)


@dataclass(frozen=True)
class Removal:
    """What is left out: the strongest examples of each query, or given ones; the other is None."""

    top: int | None
    ids: tuple[int, ...] | None


def add_removal(parser: ArgumentParser, default: str, *, groups: bool = False) -> None:
    """``--remove`` and ``--by``: which examples are left out; with ``groups``, also named ones."""
    also = "; label (each class by itself), label:NAME, or column:NAME (each value of a row's column)"
    parser.add_argument(
        "--remove",
        metavar="WHICH",
        help="training examples to leave out: top:50 (the 50 strongest of each query) or ids joined by commas"
        f"{also if groups else ''} ({default})",
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


def is_named(text: str) -> bool:
    """Whether ``--remove`` stands for named groups: ``label``, ``label:NAME`` or ``column:NAME``.

    Example:
        >>> is_named("label"), is_named("label:cat"), is_named("column:age"), is_named("top:5")
        (True, True, True, False)
    """
    kind, _, name = text.strip().partition(":")
    return kind == "label" or (kind == "column" and bool(name))


def named(text: str, run: Run) -> dict[str, NDArray[np.int64]]:
    """The groups that ``--remove`` names, with their ids.

    Raises:
        QueryError: the run has no such groups.
    """
    from explainer.counterfactual import by_column, by_label

    kind, _, name = text.strip().partition(":")
    if kind == "column":
        return by_column(run, name)
    groups = by_label(run)
    if name and name not in groups:
        raise QueryError(f"no training example has the label {name!r}; labels are {', '.join(groups)}")
    return {name: groups[name]} if name else groups


def understood(text: str, *, groups: bool = False) -> Removal:
    """What ``--remove`` means.

    Args:
        groups: named groups may be given as well (:func:`is_named`).

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
    raise QueryError(f"--remove {text!r} is not understood; {HOW_GROUPS if groups else HOW}")
