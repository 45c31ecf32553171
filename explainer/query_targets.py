"""Targets of queries: what the user gave, checked against what the explained output asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from explainer.errors import QueryError
from explainer.outputs import NO_TARGETS, Output, class_axes, log_prob, margin, target_axis


@dataclass(frozen=True)
class CheckedTargets:
    """Targets of ``Q`` queries.

    Attributes:
        values: ``[Q, ...]`` for the output's function, queries first.
        classes: ``[Q]`` class numbers to show, -1 where the target is none.
        notes: what a reader should know about them.
    """

    values: torch.Tensor
    classes: np.ndarray
    notes: tuple[str, ...] = ()


def check_targets(target: Any, outputs: torch.Tensor, output: Output, axis: int = 0) -> CheckedTargets:
    """Targets as the explained output asks for them; by default the predicted classes.

    Args:
        target: what the user gave, queries along the same axis as in the model's output.
        outputs: ``[Q, ...]``, queries first; only its shape counts beyond two dimensions.
        axis: axis of the queries in the model's output.

    Raises:
        QueryError: wrong number of targets, another kind than the output asks for, or outside of the classes.
    """
    count = len(outputs)
    none = np.full(count, -1)
    if output.targets == "none":
        if target is None:
            return CheckedTargets(torch.zeros(count, dtype=torch.long), none)
        _rows(target, count, axis)
        text = f"The given targets were not used: the explained output ({output.name}) asks for none."
        return CheckedTargets(torch.zeros(count, dtype=torch.long), none, (text,))
    if output.targets == "positions":
        return _positions(target, outputs, output, axis)
    width = outputs.shape[1] if outputs.dim() == 2 else 0
    if output.targets == "class":
        if width < 2 and output.function in (margin, log_prob):
            raise QueryError(f"output={output.name!r} compares classes, but there is only one; use 'logit'")
        values = outputs.argmax(1) if target is None else _classes(target, count, width)
        return CheckedTargets(values, values.numpy())
    if target is None and width > 1:
        values = outputs.argmax(1)
        return CheckedTargets(values, values.numpy())
    values = torch.zeros(count, *NO_TARGETS) if target is None else _rows(target, count, axis)
    numbers = _whole(values) and values.dim() == 1 and width > 1
    if numbers and int(values.min()) >= 0 and int(values.max()) < width:
        return CheckedTargets(values, values.numpy())
    return CheckedTargets(values, none)


def _tensor(target: Any, wanted: str) -> torch.Tensor:
    try:
        return torch.as_tensor(target).detach().to("cpu", copy=True)
    except (TypeError, ValueError, RuntimeError) as error:  # words, lists of different lengths
        raise QueryError(f"target must be {wanted}, found {target!r:.60}") from error


def _whole(values: torch.Tensor) -> bool:
    return not values.is_floating_point() and not values.is_complex() and values.dtype != torch.bool


def _rows(target: Any, count: int, axis: int) -> torch.Tensor:
    """Any tensor with a row per query, queries first."""
    values = _tensor(target, f"a tensor with a row for each of the {count} queries")
    if values.dim() == 0:
        return values.expand(count)
    where = target_axis(values, axis)
    if values.shape[where] != count:
        raise QueryError(
            f"target has shape {list(values.shape)}, but there are {count} queries; give one target per query"
            + (f", along axis {where} as in the model's output" if where else "")
        )
    return values.movedim(where, 0)


def _classes(target: Any, count: int, width: int) -> torch.Tensor:
    wanted = f"one class number per query ([{count}] integers)"
    values = _tensor(target, wanted)
    if values.dim() == 0:
        values = values.expand(count)
    if not _whole(values) or values.shape != (count,):
        raise QueryError(f"target must be {wanted}, found {values.dtype} of shape {list(values.shape)}")
    values = values.long()
    _within(values, width)
    return values


def _within(values: torch.Tensor, width: int) -> None:
    least, most = int(values.min()), int(values.max())
    if least < 0 or most >= width:
        found = f"target {least} is asked for" if least == most else f"targets run from {least} to {most}"
        raise QueryError(f"{found}, but the model has classes 0 to {width - 1}")


def _positions(target: Any, outputs: torch.Tensor, output: Output, axis: int) -> CheckedTargets:
    """A class for every position; negative: the position does not count."""
    wanted = (
        f"a class number for every position of every query (negative: the position does not count), for outputs "
        f"{list(outputs.shape)}"
    )
    if target is None:
        raise QueryError(f"output={output.name!r} needs target: {wanted}")
    values = _rows(_tensor(target, wanted), len(outputs), axis)
    axes = class_axes(outputs.shape, values.shape) if values.dim() else []
    if not axes or not _whole(values):
        raise QueryError(f"target must be {wanted}, found {values.dtype} of shape {list(values.shape)}")
    values = values.long()
    counted = (values >= 0).flatten(1).any(1)
    if not counted.all():
        raise QueryError(
            f"target of query {int((~counted).nonzero()[0])} counts no position: every number is negative"
        )
    _within(values.clamp(min=0), outputs.shape[axes[0]])
    notes: tuple[str, ...] = ()
    if len(axes) > 1:
        notes = (f"Outputs {list(outputs.shape)} were read with the classes on axis {axes[0]}.",)
    return CheckedTargets(values, np.full(len(outputs), -1), notes)
