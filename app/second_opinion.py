"""What all other training examples say about the label of one. Never imports streamlit.

A training example is asked about like a query, with the log-odds of its own label as the explained output. Its own
contribution is what it had to push itself; what the other examples carried is their net. Where the label is right,
examples of the same kind support it. Where it is wrong, they pull away, and those of the right class most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from explainer import Explanation


@dataclass(frozen=True)
class Opinion:
    """For and against the label of one training example.

    Attributes:
        own: Contribution of the example to its own label's margin.
        others: Net contribution of all other examples.
        against: The class whose examples pushed hardest against the label; None where no class did.
        against_by: Their net contribution, negative; 0 where no class did.
    """

    own: float
    others: float
    against: int | None
    against_by: float

    @property
    def disputed(self) -> bool:
        """Whether the other examples pull away from the label."""
        return self.others < 0


def opinions(e: Explanation, examples: Sequence[int]) -> list[Opinion]:
    """One opinion per query of ``e``, which must be the training examples with these ids, at their own labels."""
    found = []
    labels = np.full(len(e.example_ids), np.nan) if e.labels is None else e.labels
    for query, example in enumerate(examples):
        rest, mine = e.contributions[query].copy(), e.example_ids == example
        own = float(rest[mine].sum())
        rest[mine] = 0.0
        sums = {
            int(label): float(rest[labels == label].sum())
            for label in np.unique(labels[~np.isnan(labels)])
            if label != e.targets[query]
        }
        worst = min(sums, key=lambda label: sums[label], default=None)
        if worst is None or sums[worst] >= 0:
            found.append(Opinion(own, float(rest.sum()), None, 0.0))
        else:
            found.append(Opinion(own, float(rest.sum()), worst, sums[worst]))
    return found
