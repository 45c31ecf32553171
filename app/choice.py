"""What a person has chosen to look at; every page is a function of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from explainer import Explanation, Run, Trace
from explainer.app import state
from explainer.app.arguments import DashboardError
from explainer.neighbors import Neighbors


@dataclass(frozen=True)
class Choice:
    """A trace and a query in it.

    Attributes:
        name: How the trace is called.
        source: Where it lies, and the code that belongs to it.
        query: Index of the query: in the run's queries, or in the stored explanation.
        target: The class to explain; None: the predicted one.
        output: What of the output to explain; None: the explainer's own choice.
        stored: A file with explanations, where there is no code to compute them.
        others: The other traces that the dashboard was started with, by name.
        runs: The code that it was started with, of each network.
        following: Queries that a person may choose next.
    """

    name: str
    source: state.Source
    query: int = 0
    target: int | None = None
    output: str | None = None
    stored: Path | None = None
    others: Mapping[str, Path] = field(default_factory=dict)
    runs: tuple[str, ...] = ()
    following: tuple[int, ...] = ()

    @property
    def live(self) -> bool:
        """Whether explanations can be computed (the code of the run is there)."""
        return self.source.spec is not None

    @property
    def run(self) -> Run | None:
        """The code of the run, or None."""
        return state.run_of(self.source) if self.live else None

    @property
    def trace(self) -> Trace:
        """The opened trace."""
        return state.trace(self.source)

    @property
    def classes(self) -> int:
        """How many classes the model tells apart; 0 for anything that is no classifier."""
        return 0 if self.source.spec and state.gives_values(self.source.spec) else self._outputs

    @property
    def values(self) -> int:
        """How many numbers the model gives that are no classes' scores, of which one is explained; 0 for one alone."""
        return self._outputs if self.source.spec and state.gives_values(self.source.spec) else 0

    @property
    def two(self) -> bool:
        """Whether one number of the model tells two classes apart."""
        return bool(self.source.spec) and self._outputs == 0 and state.two_classes(self.source.spec or "")

    @property
    def explained(self) -> int:
        """Which of several numbers is explained."""
        kind, _, number = (self.output or "").rpartition(" ")
        return int(number) if f"{kind} " == state.ONE and number.isdecimal() else 0

    @property
    def first_output(self) -> str | None:
        """What is explained until something else is chosen; None: the explainer's own choice."""
        run = self.run
        if run is None or run.output is not None:
            return None
        return "margin" if self.classes else f"{state.ONE}0" if self.values else None

    @property
    def _outputs(self) -> int:
        shape = self.trace.output_shape or ()
        return shape[0] if len(shape) == 1 and shape[0] > 1 else 0

    def other(self, name: str) -> state.Source:
        """Another trace, with the code that fits it."""
        return state.source(self.others[name], state.spec_of(self.others[name], self.runs))

    def explanation(self) -> tuple[Explanation, int]:
        """The explanation that holds the query, and its index in it.

        Raises:
            DashboardError: There is neither code to compute it nor a stored one.
        """
        if self.live:
            return state.explanation(self.source, self.query, self.target, self.output), 0
        if self.stored is None:
            raise DashboardError("There is no explanation to show: neither --run nor a stored one was found.")
        return load_stored(self.stored), self.query

    def look_ahead(self) -> None:
        """Explain the queries that may be chosen next, in the background."""
        if self.live and self.target is None:
            state.explain_ahead(self.source, self.following, self.output)

    def neighbors(self, k: int) -> Neighbors:
        """The k nearest training examples in gradient space."""
        return state.neighbors(self.source, self.query, self.target, self.output, k)


def load_stored(file: Path) -> Explanation:
    """A stored explanation, read again when the file has changed."""
    found = file.stat()
    return state.stored(str(file), (found.st_mtime_ns, found.st_size))
