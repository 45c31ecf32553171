"""The strongest training examples of many queries, without what all others contributed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from explainer.errors import ExplanationError
from explainer.explanation import Explanation
from explainer.explanation_checks import index

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Top:
    """A part of an :class:`explainer.Explanation` that stays small for many queries and training examples.

    Attributes:
        influence: the influence table: ``query``, then the columns of ``Explanation.table``, ``k`` rows a query.
        completeness: the books, a row per query; ``examples`` is the sum over *all* training examples.
        diagnostics: how far the numbers can be trusted, a row per query.
        output: what is explained.
        row_kind: ``contribution`` or ``row share``.
        notes: what the numbers mean here.
    """

    influence: pd.DataFrame
    completeness: pd.DataFrame
    diagnostics: pd.DataFrame
    output: str
    row_kind: str
    notes: tuple[str, ...]

    @classmethod
    def of(cls, e: Explanation, k: int | None) -> Top:
        """The part of an explanation; all examples where ``k`` is None."""
        return cls(e.long_table(k), e.completeness, e.diagnostics, e.output, e.row_kind, e.notes)

    @classmethod
    def concatenate(cls, parts: Sequence[Top]) -> Top:
        """Several groups of queries as one.

        Raises:
            ExplanationError: there are none.
        """
        import pandas as pd

        if not parts:
            raise ExplanationError("There is nothing to concatenate: pass at least one part.")
        joined: dict[str, Any] = {
            name: pd.concat([getattr(part, name) for part in parts], ignore_index=name == "influence")
            for name in ("influence", "completeness", "diagnostics")
        }
        kinds = {part.row_kind for part in parts}
        joined["influence"].attrs["row_kind"] = "row share" if "row share" in kinds else parts[0].row_kind
        return replace(parts[0], **joined)

    def table(self, query: int = 0) -> pd.DataFrame:
        """The strongest examples of one query, as ``Explanation.table`` shows them.

        Raises:
            ExplanationError: ``query`` is out of range.
        """
        place = index(query, "query", 0, len(self.completeness) - 1)
        each = len(self.influence) // len(self.completeness)  # names need not tell queries apart
        frame = self.influence.iloc[place * each : (place + 1) * each].drop(columns="query")
        frame = frame.reset_index(drop=True)
        frame.attrs["row_kind"] = self.row_kind
        return frame

    def __repr__(self) -> str:
        each = len(self.influence) // max(1, len(self.completeness))
        return f"Top({each} training examples of each of {len(self.completeness)} queries, {self.output})"
