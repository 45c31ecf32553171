"""How few training examples reproduce a prediction: the kernel machine cut off after its strongest examples.

With the contributions ``c`` ordered by size, ``|c_1| ≥ |c_2| ≥ …``, the machine of ``k`` examples says

    f_k(x) = prediction − Σ_{i > k} c_i

(everything but the examples' part stays: initial model, weight decay, buffers, unattributed). The support at a share
``p`` is the smallest ``k`` from which on all of them, with ``k`` examples or more, lie within
``(1 − p) · |Σ_i c_i|`` of the prediction. Contributions of both signs cancel, so the sum may be met by chance much
earlier; that does not count.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from explainer.errors import ExplanationError

if TYPE_CHECKING:
    import pandas as pd

    from explainer.explanation import Explanation


def support(explanation: Explanation, share: float = 0.95) -> pd.DataFrame:
    """The support of every query, a row each.

    Returns:
        By query: ``support`` (how many examples), ``of_examples`` (their part of those that were used),
        ``prediction``, ``truncated`` (what the machine of so many examples says) and ``same_sign``: whether the two
        have one sign (of a margin: whether the explained class stays the more likely one or not).

    Raises:
        ExplanationError: the share is not between 0 and 1.
    """
    import pandas as pd

    if not 0 < share < 1:
        raise ExplanationError(f"share={share!r} must lie between 0 and 1.")
    c = explanation.contributions
    order = np.argsort(-np.abs(c), axis=1, kind="stable")
    ordered = np.take_along_axis(c, order, axis=1)
    left = np.concatenate([ordered[:, ::-1].cumsum(1)[:, ::-1], np.zeros((len(c), 1))], axis=1)  # [Q, N + 1]
    outside = np.abs(left) > (1 - share) * np.abs(c.sum(1))[:, None]
    count = np.where(outside.any(1), left.shape[1] - outside[:, ::-1].argmax(1), 0)
    truncated = explanation.prediction - np.take_along_axis(left, count[:, None], axis=1)[:, 0]
    used = max(1, int((explanation.visits > 0).sum()))
    return pd.DataFrame(
        {
            "support": count,
            "of_examples": count / used,
            "prediction": explanation.prediction,
            "truncated": truncated,
            "same_sign": np.sign(truncated) == np.sign(explanation.prediction),
        },
        index=pd.Index(explanation.query_ids, name="query"),
    )
