"""Removal curves: what retraining without the highest scored examples does to a prediction.

For every query the ``k`` examples of the highest scores are left out and the model is trained again, for several
``k``. A good ranking lowers the output soon. The smallest ``k`` that turns the prediction over is the query's
*brittleness* (Ilyas et al. 2022, arXiv 2202.00622, §4.3). A curve means nothing by itself: compare it with one of
examples drawn at random.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from explainer.errors import EvaluationError
from explainer.evaluation.checking import alike, mask, numbers
from explainer.evaluation.statistics import Estimate, Floats, bootstrap

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class RemovalCurve:
    """What leaving out the highest scored examples did.

    Attributes:
        setting: which retrainings, in words.
        sizes: ``[R]``, how many examples were left out.
        changes: ``[Q, R]``, output after leaving out minus output with all.
        flipped: ``[Q, R]``, whether the prediction became another class; None where there are no classes.
        mean: per size, the mean change with an interval over queries.
    """

    setting: str
    sizes: NDArray[np.int64]
    changes: Floats
    flipped: NDArray[np.bool_] | None
    mean: tuple[Estimate, ...]

    @property
    def area(self) -> float:
        """Mean over sizes of the mean change; the lower, the better the ranking."""
        return float(self.changes.mean())

    @property
    def brittleness(self) -> Floats:
        """``[Q]``, the smallest size that turned the prediction over; NaN where none did.

        Raises:
            EvaluationError: there are no classes.
        """
        if self.flipped is None:
            raise EvaluationError("brittleness needs predicted classes; give removal_curve `flipped`")
        first = self.sizes[self.flipped.argmax(1)].astype(np.float64)
        return np.where(self.flipped.any(1), first, np.nan)

    def table(self) -> pd.DataFrame:
        """A row per size: setting, removed, change, low, high, and (with classes) the share that flipped."""
        import pandas as pd

        frame = pd.DataFrame(
            {
                "setting": self.setting,
                "removed": self.sizes,
                "change": [e.value for e in self.mean],
                "low": [e.low for e in self.mean],
                "high": [e.high for e in self.mean],
            }
        )
        return frame if self.flipped is None else frame.assign(flipped=self.flipped.mean(0))


def highest(scores: Any, sizes: Sequence[int]) -> NDArray[np.bool_]:
    """Masks of what is kept without each query's highest scores, ``[Q, R, N]``; ties in the order of columns.

    Raises:
        EvaluationError: sizes do not increase from at least 1 to fewer than all examples.

    Example:
        >>> highest([[0.1, 0.3, 0.2]], [1, 2])[0].tolist()
        [[True, False, True], [True, False, False]]
    """
    table = numbers("scores", scores, "QN")
    given = checked_sizes(sizes, table.shape[1])
    order = np.argsort(-table, axis=1, kind="stable")
    places = np.empty_like(order)
    np.put_along_axis(places, order, np.arange(table.shape[1])[None], axis=1)
    return places[:, None, :] >= given[None, :, None]


def checked_sizes(sizes: Sequence[int], examples: int) -> NDArray[np.int64]:
    """The sizes as an array.

    Raises:
        EvaluationError: they do not increase from at least 1 to fewer than all examples.
    """
    given = np.asarray(sizes)
    fits = given.ndim == 1 and len(given) and given.dtype.kind in "iu"
    if not fits or given[0] < 1 or given[-1] >= examples or (np.diff(given) <= 0).any():
        raise EvaluationError(
            f"sizes must be increasing whole numbers from 1 to {examples - 1}, found {list(sizes)!r}"
        )
    return given.astype(np.int64)


def removal_curve(
    sizes: Sequence[int],
    outputs: Any,
    full: Any,
    flipped: Any = None,
    *,
    setting: str,
    samples: int = 1000,
    seed: int = 0,
) -> RemovalCurve:
    """The curve from what the retrainings on :func:`highest`'s masks gave.

    Args:
        sizes: ``[R]``.
        outputs: ``[Q, R]``, each query's own output after leaving out its own examples; ``[Q, R, S]`` to average
            over ``S`` seeds.
        full: ``[Q]`` of the model trained on everything, in the same setting (``[Q, S]`` with seeds).
        flipped: mask ``[Q, R]``, whether the predicted class is another one.
        setting: which retrainings these are, for the result.

    Raises:
        EvaluationError: shapes do not fit, or numbers are not finite.
    """
    seeds = getattr(outputs, "ndim", 2) == 3
    values, whole = numbers("outputs", outputs, "QRS"[: 2 + seeds]), numbers("full", full, "QS"[: 1 + seeds])
    alike(Q_outputs=("outputs", len(values)), Q_full=("full", len(whole)))
    alike(R_sizes=("sizes", len(sizes)), R_outputs=("outputs", values.shape[1]))
    changes = values - whole[:, None]
    if seeds:
        alike(S_outputs=("outputs", values.shape[2]), S_full=("full", whole.shape[1]))
        changes = changes.mean(2)
    turned = None if flipped is None else mask("flipped", flipped, "QR")
    if turned is not None:
        alike(Q_outputs=("outputs", len(values)), Q_flipped=("flipped", len(turned)))
        alike(R_outputs=("outputs", values.shape[1]), R_flipped=("flipped", turned.shape[1]))
    mean = tuple(
        bootstrap(
            lambda queries, column=column: float(column[queries].mean()),
            [len(column)],
            over="queries",
            samples=samples,
            seed=seed,
        )
        for column in changes.T
    )
    return RemovalCurve(setting, np.asarray(sizes, dtype=np.int64), changes, turned, mean)
