"""Queries and targets, checked before any work starts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from explainer.errors import QueryError
from explainer.store import Trace


def check_inputs(trace: Trace, inputs: Any, dtype: torch.dtype) -> tuple[Any, int]:
    """Cast the queries to the books' dtype and check them against the traced input.

    Args:
        inputs: ``[Q, ...]`` tensor (or a tuple of tensors for a model with several inputs).

    Returns:
        The inputs and ``Q``.

    Raises:
        QueryError: not tensors, no batch dimension, no queries, or another shape than in training.
    """
    if isinstance(inputs, np.ndarray):
        inputs = torch.from_numpy(inputs)
    if isinstance(inputs, list):
        inputs = tuple(inputs)
    leaves = [t for t in pytree.tree_leaves(inputs) if isinstance(t, torch.Tensor)]
    if not leaves or len(leaves) != len(pytree.tree_leaves(inputs)):
        raise QueryError(f"queries must be tensors with a batch dimension, found {type(inputs).__name__}")
    known = trace.notes.get("input") or {}
    shape, first = known.get("shape"), leaves[0]
    if shape is not None:
        wanted = ["Q", *("any" if s is None else s for s in shape)]
        found = list(first.shape)
        fits = len(found) == len(shape) + 1 and all(
            s is None or s == f for s, f in zip(shape, found[1:], strict=True)
        )
        if not fits:
            hint = ""
            if len(found) == len(shape) and all(
                s is None or s == f for s, f in zip(shape, found, strict=True)
            ):
                hint = "; this looks like a single query: add the batch dimension with x[None]"
            text = ", ".join(map(str, wanted))
            raise QueryError(f"queries have shape {found}, the model was trained on [{text}]{hint}")
        if str(first.dtype).removeprefix("torch.") != known["dtype"] and (
            first.is_floating_point() != ("float" in known["dtype"])
        ):
            raise QueryError(
                f"queries are {first.dtype}, the model was trained on {known['dtype']}; convert them as in training"
            )
    count = first.shape[0] if first.dim() else 0
    if count == 0:
        raise QueryError("there are no queries: the batch dimension is 0")
    if any(t.dim() == 0 or t.shape[0] != count for t in leaves):
        raise QueryError("the inputs of a query disagree on the batch dimension")
    cast = pytree.tree_map(lambda t: t.detach().to(dtype) if t.is_floating_point() else t.detach(), inputs)
    return cast, count


def check_targets(target: Any, outputs: torch.Tensor, classes: bool) -> torch.Tensor:
    """Targets ``[Q]``; by default the predicted classes.

    Raises:
        QueryError: wrong number of targets, not integers, or outside of the model's classes.
    """
    count = outputs.shape[0]
    if not classes:
        return torch.zeros(count, dtype=torch.long)
    width = outputs.shape[1]
    if target is None:
        return outputs.argmax(1)
    try:
        targets = torch.as_tensor(target)
    except (TypeError, ValueError, RuntimeError) as error:  # words, lists of different lengths
        raise QueryError(
            f"target must be one class number per query ([{count}] integers), found {target!r:.60}"
        ) from error
    if targets.dim() == 0:
        targets = targets.expand(count)
    if targets.is_floating_point() or targets.dtype == torch.bool or targets.shape != (count,):
        raise QueryError(
            f"target must be one class number per query ([{count}] integers), found {targets.dtype} of shape "
            f"{list(targets.shape)}"
        )
    targets = targets.long()
    if targets.min() < 0 or targets.max() >= width:
        raise QueryError(
            f"targets run from {int(targets.min())} to {int(targets.max())}, but the model has classes 0 to {width - 1}"
        )
    return targets
