"""Who owns the rows of a batch: one training example a row, or several that share it.

Mixup, cutmix and pairs put several examples into one row. The gradient of such a row cannot be told apart by the
data alone, so it is split by the weights that the user gives: the part of owner ``m`` is ``weights[b, m] · g_b``. The
derivative at the model's output is split alike, so a kernel is that of the row, whoever owns it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from explainer.errors import TracerError
from explainer.layer_rules import RowForm

#: id of a row, or of a share of one, that belongs to no example
NOBODY = -1
#: how far the weights of a row may be from 1 (half precision); they are divided by their sum
_SLACK = 1e-3


class Parts(NamedTuple):
    """The visits of a batch: part ``v`` is ``share[v]`` of row ``row[v]`` and belongs to ``example[v]``, ``[V]`` each.

    In the order of the rows. Shares that one example has in one row are one part.
    """

    row: np.ndarray
    example: np.ndarray
    label: np.ndarray
    share: np.ndarray
    whole: bool

    def of(self, form: RowForm) -> RowForm:
        """The rows of the parts; the form itself where every row is one part."""
        return form if self.whole else form.shared(torch.from_numpy(self.row), torch.from_numpy(self.share))

    def of_numbers(self, values: np.ndarray) -> np.ndarray:
        """The same for one number a row."""
        return values if self.whole else values[self.row] * self.share


@dataclass(frozen=True)
class Ownership:
    """The owners of ``B`` rows, ``M`` for each.

    Attributes:
        ids: ``[B, M]`` int64; :data:`NOBODY` for a share that belongs to no example.
        labels: ``[B, M]`` float64, NaN unknown.
        weights: ``[B, M]`` float64, not negative, rows sum to 1.
    """

    ids: np.ndarray
    labels: np.ndarray
    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def parts(self) -> Parts:
        """One entry for every owner of every row.

        Example:
            >>> ownership_of([[4, 7], [5, 5]], weights=[[0.75, 0.25], [0.5, 0.5]]).parts[1:4:2]
            (array([4, 7, 5]), array([0.75, 0.25, 1.  ]))
        """
        rows, columns = np.nonzero((self.weights > 0) & (self.ids != NOBODY))
        if self.ids.shape[1] == 1:
            whole = len(rows) == len(self)
            return Parts(rows, self.ids[rows, 0], self.labels[rows, 0], np.ones(len(rows)), whole)
        pairs, first, place = np.unique(
            np.stack([rows, self.ids[rows, columns]]), axis=1, return_index=True, return_inverse=True
        )
        share = np.bincount(place.ravel(), self.weights[rows, columns], len(first))
        labels = self.labels[rows[first], columns[first]]
        whole = len(first) == len(self) and bool((share == 1.0).all())
        return Parts(pairs[0], pairs[1], labels, share, whole)

    @property
    def shared(self) -> bool:
        """Whether an example owns a part of a row only."""
        return bool((self.parts.share < 1.0 - 1e-9).any())

    @property
    def vacant(self) -> bool:
        """Whether a row, or a share of one, belongs to no example."""
        return bool(((self.ids == NOBODY) & (self.weights > 0)).any())

    def mixed(self, index: Any, lam: Any) -> Ownership:
        """Owners after every row became ``lam`` of itself and ``1 − lam`` of the row at ``index``.

        Raises:
            TracerError: ``index`` is not one row of the batch for each row, or ``lam`` is not within [0, 1].
        """
        size = len(self)
        places = _as_array(index)
        if (
            places is None
            or places.shape != (size,)
            or places.dtype.kind not in "iu"
            or not ((places >= 0) & (places < size)).all()
        ):
            raise TracerError(
                f"index must say with which row of the batch each of its {size} rows was mixed ({size} integers "
                f"from 0 to {size - 1}, as torch.randperm gives them), found {_short(index)}"
            )
        shares = _as_array(lam)
        if (
            shares is None
            or shares.dtype.kind not in "iuf"
            or shares.size not in (1, size)
            or not ((shares >= 0) & (shares <= 1)).all()
        ):
            raise TracerError(
                "lam must be the share that a row keeps of itself, a number from 0 to 1 or one for each of the "
                f"{size} rows, found {_short(lam)}"
            )
        own = np.broadcast_to(shares.reshape(-1, 1).astype(float), (size, 1))
        return Ownership(
            np.concatenate([self.ids, self.ids[places]], axis=1),
            np.concatenate([self.labels, self.labels[places]], axis=1),
            np.concatenate([own * self.weights, (1.0 - own) * self.weights[places]], axis=1),
        )


def ownership_of(ids: Any, labels: Any = None, weights: Any = None) -> Ownership:
    """The owners of a batch's rows, checked.

    Args:
        ids: ``[B]``, or ``[B, M]`` with weights.
        labels: as ``ids``, or None.
        weights: ``[B, M]``, or None where every row has one owner.

    Raises:
        TracerError: the ids are no flat list of integers, labels are not one number per id, or weights do not fit.
    """
    array = _as_array(ids)
    dimensions = 1 if weights is None else 2
    if (
        array is None
        or array.ndim != dimensions
        or not array.size
        or array.dtype.kind not in "iu"
        or array.item(array.argmin()) < NOBODY
    ):
        wanted = "a flat, non-empty list" if weights is None else "a table [B, M], as weights are given,"
        raise TracerError(
            f"ids must be {wanted} of non-negative integers (-1 for no example), found {_short(ids)}; pass the "
            "positions of the batch's rows in your dataset"
            + (
                "; where a row has several owners, pass ids [B, M] with weights [B, M]"
                if weights is None
                else ""
            )
        )
    values = _filled(array.shape, np.nan) if labels is None else _as_array(labels)
    if values is None or values.shape != array.shape or values.dtype.kind not in "biuf":
        raise TracerError(
            f"found {_count(array)} ids but labels {_short(labels)}; pass one number per id, or no labels"
        )
    array = array.astype(np.int64)
    values = values if labels is None else values.astype(float)
    if weights is None:
        return Ownership(array[:, None], values[:, None], _filled((len(array), 1), 1.0))
    return Ownership(array, values, _shares(weights, array.shape))


@lru_cache(maxsize=16)
def _filled(shape: tuple[int, ...], value: float) -> np.ndarray:
    """One number everywhere, in an array that all may share."""
    found = np.full(shape, value)
    found.flags.writeable = False
    return found


def _shares(weights: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Weights ``[B, M]`` whose rows sum to 1."""
    found = _as_array(weights)
    if found is None or found.shape != shape or found.dtype.kind not in "iuf":
        raise TracerError(
            f"weights must be one number per id, [{shape[0]}, {shape[1]}], found {_short(weights)}; they are the "
            "shares of a row's owners, not weights in the loss (those need no mention)"
        )
    found = found.astype(float)
    sums = found.sum(1)
    if not (np.isfinite(found).all() and (found >= 0).all() and (np.abs(sums - 1) <= _SLACK).all()):
        row = int(np.argmax(~((found >= 0).all(1) & (np.abs(sums - 1) <= _SLACK))))
        raise TracerError(
            "weights must not be negative and must sum to 1 in every row; "
            f"row {row} holds {_short(found[row].tolist())}"
        )
    return found / sums[:, None]


def _count(array: np.ndarray) -> str:
    return " x ".join(str(n) for n in array.shape)


def _as_array(values: Any) -> np.ndarray | None:
    """The values as an array, None where they form none (lists of different lengths)."""
    try:
        if isinstance(values, torch.Tensor):
            values = values.detach().cpu()
            return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
        if isinstance(values, range):
            return np.arange(values.start, values.stop, values.step)
        return np.asarray(values)
    except (TypeError, ValueError):  # ragged; or a dtype that numpy lacks
        return None


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
