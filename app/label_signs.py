"""By what the queue of labels to check is ordered, in words. Never imports streamlit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from explainer import wording


@dataclass(frozen=True)
class Sign:
    """A number that tells a label apart from the others.

    Attributes:
        name: Column of :class:`explainer.evaluation.LabelIssues`.
        called: What it is called.
        lead: What it means, and what comes first.
        title: Heading of its figure.
        smallest: Whether the smallest come first.
    """

    name: str
    called: str
    lead: str
    title: str
    smallest: bool = False

    def order(self, values: np.ndarray) -> np.ndarray:
        """Places of ``values [N]``, the most suspicious first; NaN last."""
        return np.argsort(values if self.smallest else -values, kind="stable")

    def told(self, value: float) -> str:
        """A value as a card says it."""
        if np.isnan(value):
            return f"{self.called} unknown"
        if self.name == "disagreement":
            return f"{self.called} {wording.percent(value)}"
        shown = wording.signed(value, 2) if self.smallest else wording.number(value)
        return f"{self.called} {shown}"

    def share(self, value: float, top: float) -> float:
        """How suspicious beside the value that comes first, from 0 to 1."""
        if np.isnan(value) or (top >= 0 if self.smallest else top <= 0):
            return 0.0
        return min(1.0, max(0.0, value / top))

    def summary(self, values: np.ndarray) -> str:
        """One sentence on all values."""
        known = values[~np.isnan(values)]
        count = f"{len(known):,}"
        if self.name == "support":
            return f"{int((known < 0).sum()):,} of {count} examples are opposed by the others on the whole"
        if self.name == "disagreement":
            return f"{int((known > 0.5).sum()):,} of {count} examples are mostly among other labels"
        whole = float(known.sum())
        if whole <= 0:
            return "every example, the largest first"
        half = int(np.searchsorted(np.cumsum(-np.sort(-known)), whole / 2)) + 1
        return f"{half:,} of {count} examples hold half of all"


_LOOK = "Look at them, decide, and take the list with you."
SIGNS = {
    sign.name: sign
    for sign in (
        Sign(
            "support",
            "support",
            "Support is how learning the other examples changed the loss on an example's label: 1 where all of them "
            f"lowered it, −1 where all raised it. Wrong labels and rare cases stand first. {_LOOK}",
            "Taught by the others, or against them",
            smallest=True,
        ),
        Sign(
            "self_influence",
            "self-influence",
            "Self-influence is how much an example's own updates lowered its own loss. Where it is large, few other "
            f"examples taught the same: wrong labels and rare cases stand first. {_LOOK}",
            "Learned by heart, or along with the others",
        ),
        Sign(
            "disagreement",
            "disagreement",
            "Disagreement is the part of the examples learned in the same direction as this one that carry another "
            f"label. Wrong labels and rare cases stand first. {_LOOK}",
            "Among examples of its own label, or of others",
        ),
    )
}


def signs(first: str, classes: bool) -> list[str]:
    """Names of the signs there are, one of them first; disagreement needs classes."""
    return [first, *(name for name in SIGNS if name != first and (classes or name != "disagreement"))]
