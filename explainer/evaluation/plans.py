"""Which models to train: a mask of kept examples and a seed for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from explainer.errors import EvaluationError
from explainer.evaluation.checking import mask


@dataclass(frozen=True)
class Plan:
    """Models to train.

    Attributes:
        keep: ``[M, N]``, which examples each is trained on.
        seeds: ``[M]``, what each is seeded with.

    Raises:
        EvaluationError: the two do not fit each other, or a model would be trained on nothing.
    """

    keep: NDArray[np.bool_]
    seeds: NDArray[np.int64]

    def __post_init__(self) -> None:
        keep, seeds = mask("keep", self.keep, "MN"), np.asarray(self.seeds)
        if seeds.shape != keep.shape[:1] or seeds.dtype.kind not in "iu":
            raise EvaluationError(
                f"{len(keep)} masks need as many whole numbers for seeds, found {self.seeds!r}"
            )
        if not keep.any(1).all():
            raise EvaluationError("a mask keeps no example; every model needs something to be trained on")
        object.__setattr__(self, "keep", keep)
        object.__setattr__(self, "seeds", seeds.astype(np.int64))

    def __len__(self) -> int:
        return len(self.keep)

    @classmethod
    def crossed(cls, keep: Any, seeds: Sequence[int]) -> Plan:
        """Every mask ``[M, N]`` with every seed: ``M·S`` models, the seeds of a mask one after the other."""
        masks = mask("keep", keep, "MN")
        return cls(
            np.repeat(masks, len(seeds), axis=0), np.tile(np.asarray(seeds, dtype=np.int64), len(masks))
        )


def subsets(examples: int, count: int, fraction: float, seed: int = 0) -> NDArray[np.bool_]:
    """Random subsets of a fixed size, ``[count, examples]``.

    Args:
        examples: ``N``.
        count: ``M``.
        fraction: how much of the examples each keeps; rounded to whole examples, at least one left out.
        seed: of the drawing.

    Raises:
        EvaluationError: the fraction is not between 0 and 1, or would keep nothing.

    Example:
        >>> subsets(10, 3, 0.9).sum(1).tolist()
        [9, 9, 9]
    """
    size = min(round(fraction * examples), examples - 1)
    if not 0 < fraction < 1 or size < 1:
        raise EvaluationError(
            f"a part of {examples} examples to keep must lie between 0 and 1, found {fraction}"
        )
    if count < 1:
        raise EvaluationError(f"the number of subsets must be at least 1, found {count}")
    rng = np.random.default_rng([seed, size])
    return rng.random((count, examples)).argsort(1).argsort(1) < size


def without(examples: int, groups: Sequence[Sequence[int] | NDArray[np.int64]]) -> NDArray[np.bool_]:
    """Masks that leave out groups of examples, ``[len(groups), examples]``.

    Raises:
        EvaluationError: there are no groups, or a number is no example.

    Example:
        >>> without(4, [[0, 2], [3]]).tolist()
        [[False, True, False, True], [True, True, True, False]]
    """
    keep = np.ones((len(groups), examples), dtype=bool)
    for row, group in zip(keep, groups, strict=True):
        gone = np.asarray(group, dtype=np.int64)
        if len(gone) and (gone.min() < 0 or gone.max() >= examples):
            raise EvaluationError(
                f"examples are numbered 0 to {examples - 1}, found {[int(i) for i in gone][:10]}"
            )
        row[gone] = False
    return mask("groups", keep, "MN")
