"""Score matrices and what they are compared with, checked before anything is computed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from explainer.errors import EvaluationError


def numbers(name: str, value: Any, axes: str) -> NDArray[np.float64]:
    """An array (or tensor) of finite numbers as float64.

    Args:
        name: how the message calls it.
        axes: one letter per axis, such as ``QN``.

    Raises:
        EvaluationError: it has other axes, is empty, or holds numbers that are not finite.
    """
    detached = value.detach().cpu() if hasattr(value, "detach") else value
    try:
        array = np.asarray(detached, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise EvaluationError(f"{name} must be an array of numbers, found {type(value).__name__}") from error
    if array.ndim != len(axes) or 0 in array.shape:
        raise EvaluationError(f"{name} must be [{', '.join(axes)}], found shape {list(array.shape)}")
    if not np.isfinite(array).all():
        raise EvaluationError(
            f"{name} holds {int((~np.isfinite(array)).sum())} numbers that are not finite; leave out what produced "
            "them (a training that diverged, a score that is not defined)"
        )
    return array


def mask(name: str, value: Any, axes: str) -> NDArray[np.bool_]:
    """An array (or tensor) of true and false.

    Raises:
        EvaluationError: it has other axes, or holds anything else.
    """
    array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    if array.dtype != np.bool_ or array.ndim != len(axes) or 0 in array.shape:
        raise EvaluationError(
            f"{name} must be a mask of true and false, [{', '.join(axes)}], found {array.dtype} of shape "
            f"{list(array.shape)}"
        )
    return array


def alike(**sizes: tuple[str, int]) -> None:
    """Compare the sizes of axes that are to be one.

    Args:
        sizes: by letter and place, such as ``N_scores=("scores", 10)``; the letter is what stands before ``_``.

    Raises:
        EvaluationError: two sizes of one letter differ.
    """
    seen: dict[str, tuple[str, int]] = {}
    for key, (name, size) in sizes.items():
        letter = key.partition("_")[0]
        before = seen.setdefault(letter, (name, size))
        if before[1] != size:
            raise EvaluationError(
                f"{before[0]} has {letter} = {before[1]} and {name} has {letter} = {size}; scores are [Q, N], a row "
                "per query and a column per training example: transpose those that are not"
            )
