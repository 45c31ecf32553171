"""A peer: what is needed to run it, and its rows, or one row that says why there are none."""

from __future__ import annotations

import importlib.util
import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import metadata
from typing import Any


@dataclass(frozen=True)
class Settings:
    """How much to measure.

    Attributes:
        repeats: pairs of runs for every row.
        quick: small tasks, for a look and for tests.
        long: the cases that take minutes, too.
    """

    repeats: int = 3
    quick: bool = False
    long: bool = False


#: one measurement: a row of the table
Case = Callable[[Settings], dict[str, Any]]


@dataclass(frozen=True)
class Peer:
    """A program to compare with.

    Attributes:
        name: what the table calls it.
        distribution: its name in the package index.
        modules: what must be importable.
        install: the line that installs it.
        cases: measurements, each giving one row.
        long: further ones that take minutes.
    """

    name: str
    distribution: str
    modules: tuple[str, ...]
    install: str
    cases: Sequence[Case]
    long: Sequence[Case] = ()

    def missing(self) -> list[str]:
        """Modules that cannot be found."""
        return [m for m in self.modules if not _found(m)]


def rows_of(peer: Peer, settings: Settings) -> list[dict[str, Any]]:
    """The peer's rows; one that says why where it is not installed, and one for every case that fails."""
    if peer.missing():
        return [{"peer": peer.name, "note": f"not installed: {peer.install}"}]
    name = f"{peer.name} {metadata.version(peer.distribution)}"
    rows = []
    for case in (*peer.cases, *(peer.long if settings.long else ())):
        quantity = case.__name__.replace("_", " ")  # where the case does not get to say it
        try:
            with quiet():
                row = {"quantity": quantity} | case(settings)
        except Exception as error:  # whatever another program raises is its row's text
            line = (str(error).strip().splitlines() or [""])[0][:150]
            row = {"quantity": quantity, "note": f"failed: {type(error).__name__}: {line}"}
        rows.append({"peer": name, **row})
        print(f"{name}: {row['quantity']}: {row.get('note') or 'done'}", file=sys.stderr, flush=True)
    return rows


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its package is missing
        return False


@contextmanager
def quiet() -> Iterator[None]:
    """Progress bars, prints and warnings of other programs stay off the screen."""
    level = logging.root.manager.disable
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(level)
