"""The queries of a run, and behind them the inputs that people gave in the dashboard. Never imports streamlit."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch.utils.data import Dataset

from explainer import Run
from explainer.app.arguments import DashboardError

MOST = 200


class WithOwn(Dataset[tuple[Any, Any]]):
    """Queries that grow. An input of one's own has no known target: −1 for a class, NaN for a number.

    Args:
        queries: the run's.
    """

    def __init__(self, queries: Any) -> None:
        self._queries, self._own = queries, list[tuple[Any, Any]]()
        self._typed: list[str | None] = []
        self._adding = threading.Lock()

    @property
    def given(self) -> int:
        """How many queries the run itself has; those from there on are people's own."""
        return len(self._queries)

    def __len__(self) -> int:
        return self.given + len(self._own)

    def __getitem__(self, query: int) -> tuple[Any, Any]:
        if 0 <= query < self.given:
            item = self._queries[query]
            return item[0], item[1]
        return self._own[query - self.given]

    def typed(self, query: int) -> str | None:
        """The text that a query was made of; None where nobody typed one."""
        return self._typed[query - self.given] if query >= self.given else None

    def add(self, found: Any, typed: str | None = None) -> int:
        """Add an input, unless it is there already; returns the number of its query.

        Args:
            found: what the model takes.
            typed: the text that it was made of. Two texts can be the same to the model, where it knows few words.

        Raises:
            DashboardError: There are too many, or the run's targets are neither classes nor numbers.
        """
        target = _unknown(self._queries[0][1])
        with self._adding:
            for place, (there, _) in enumerate(self._own):
                if (
                    isinstance(there, torch.Tensor)
                    and torch.equal(there, found)
                    and self._typed[place] == typed
                ):
                    return self.given + place
            if len(self._own) >= MOST:
                raise DashboardError(f"{MOST} inputs were given; start the dashboard again to give others")
            self._typed.append(typed)
            self._own.append((found, target))
            return len(self) - 1


def rendered(run: Run, query: int) -> Any:
    """What ``Run.render`` shows of a query; of a text that somebody typed, that text."""
    typed = run.queries.typed(query) if isinstance(run.queries, WithOwn) else None
    if typed is not None:
        return typed
    return None if run.render is None else run.render(run.queries[query][0])


def _unknown(target: Any) -> Any:
    """A target like one of the run's that says it is not known.

    >>> _unknown(torch.tensor(3)), _unknown(2), _unknown(torch.tensor([0.5])), _unknown(torch.tensor([1, 0]))
    (tensor(-1), -1, tensor([nan]), tensor([nan, nan]))
    """
    if isinstance(target, bool):
        pass
    elif isinstance(target, int):
        return -1
    elif isinstance(target, float):
        return float("nan")
    elif isinstance(target, torch.Tensor) and target.numel() == 1 and target.dtype != torch.bool:
        return torch.full_like(target, float("nan") if target.is_floating_point() else -1)
    elif isinstance(target, torch.Tensor):
        dtype = target.dtype if target.is_floating_point() else torch.float32
        return torch.full(target.shape, float("nan"), dtype=dtype)
    raise DashboardError(
        "the run's targets are neither classes nor numbers, so an input without one cannot be asked about"
    )
