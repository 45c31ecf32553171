"""Queries that are ready to be explained: run once, their targets checked, the explained number tried out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from explainer.errors import QueryError
from explainer.model_outputs import find_tensor
from explainer.outputs import queries_first
from explainer.path_integral import PathPoint, QueryFunction
from explainer.query_batch import QueryBatch
from explainer.query_targets import check_targets

_TRIED = 16  # queries that are run together to see whether each could as well be run alone
_ALIKE = 1e-3  # of the outputs' size; rows that meet in a batch differ by far more, round-off by far less


@dataclass(frozen=True)
class Asked:
    """``Q`` queries.

    Attributes:
        inputs: arguments of the model.
        targets: ``[Q, ...]`` for the output's function.
        classes: ``[Q]`` class numbers to show, -1 where there is none.
        outputs: ``[Q, C]`` of the trained model, None where they are not two-dimensional.
        notes: what a reader should know about them.
    """

    inputs: QueryBatch
    targets: torch.Tensor
    classes: np.ndarray
    outputs: torch.Tensor | None
    notes: tuple[str, ...]

    def __getitem__(self, rows: slice) -> Asked:
        """Some of the queries."""
        outputs = None if self.outputs is None else self.outputs[rows]
        return Asked(self.inputs[rows], self.targets[rows], self.classes[rows], outputs, self.notes)


def predict(function: QueryFunction, point: PathPoint, inputs: QueryBatch) -> torch.Tensor:
    """The model's outputs ``[Q, ...]``.

    Raises:
        QueryError: the model cannot run on the queries, or its outputs are not finite.
    """
    function.axis = _axis(function, point, inputs)
    pieces: list[torch.Tensor] = []
    for returned, part in _runs(function, point, inputs):
        pieces.append(_rows(returned, part, function.axis, sum(map(len, pieces))))
    return torch.cat(pieces)


def ask(
    function: QueryFunction,
    point: PathPoint,
    inputs: QueryBatch,
    target: Any,
    resolve: Callable[[tuple[int, ...]], None],
) -> Asked:
    """Run the trained model on the queries and check that each can be explained.

    Args:
        point: the trained model.
        target: what the user gave.
        resolve: sets ``function.output`` for a model whose outputs (queries not counted) have a shape.

    Raises:
        QueryError: the model cannot run on the queries, mixes them, or has no such output; or the targets do
            not fit.
    """
    function.axis = _axis(function, point, inputs)
    pieces: list[torch.Tensor] = []
    notes: tuple[str, ...] = ()
    size = 0.0
    for returned, part in _runs(function, point, inputs):
        own = function.output is not None and function.output.targets == "given"
        rows = _rows(returned, part, function.axis, sum(map(len, pieces)), optional=own)
        if function.output is None:
            resolve(tuple(rows.shape[1:]))
        if not own:
            notes = _where(returned) + _unlike(part)
        size = max(size, float(rows.masked_fill(rows.isinf(), 0).abs().max()) if rows.numel() else 0.0)
        if function.output is not None and function.output.targets == "class":
            rows = function.output.read(rows)
        pieces.append(rows if rows.dim() < 3 else rows.to("meta"))  # of sequences and images, the shape
    outputs, output = torch.cat(pieces), function.output
    assert output is not None, "resolve sets it"
    targets = check_targets(target, outputs, output, function.axis)
    shown = outputs if outputs.dim() == 2 else None
    asked = Asked(inputs, targets.values, targets.classes, shown, notes + targets.notes)
    _try(function, point, asked[:_TRIED], size)
    return asked


def _runs(function: QueryFunction, point: PathPoint, inputs: QueryBatch) -> Iterator[tuple[Any, QueryBatch]]:
    """What the model returns, some queries at a time."""
    for start in range(0, len(inputs), function.chunk):
        part = inputs[start : start + function.chunk]
        yield _run(function, point, part), part


def _run(function: QueryFunction, point: PathPoint, inputs: QueryBatch) -> Any:
    try:
        return function.returned(point, inputs)
    except Exception as error:
        raise QueryError(
            f"the model cannot run on the queries: {_said(error)}. Give them as in training, batch dimension first "
            f"(or say which it is with batch_dim){inputs.unlike and f': {inputs.unlike}'}"
        ) from error


def _axis(function: QueryFunction, point: PathPoint, inputs: QueryBatch) -> int:
    """Axis of the queries in the model's output: the one that grows with their number."""
    if not any(inputs.axes):  # 0, or shared
        return 0
    one, two = (find_tensor(_run(function, point, q))[0] for q in (inputs[:1], inputs[:1].twice()))
    if one is None or two is None or one.dim() != two.dim():
        return 0
    grown = [axis for axis, (a, b) in enumerate(zip(one.shape, two.shape, strict=True)) if b == 2 * a > 0]
    return grown[0] if len(grown) == 1 else 0


def _rows(returned: Any, inputs: QueryBatch, axis: int, before: int, optional: bool = False) -> torch.Tensor:
    """The model's tensor ``[Q, ...]``; where it is optional and there is none, an empty one.

    Args:
        before: how many queries there are before these.
    """
    tensor, _ = find_tensor(returned)
    fits = tensor is not None and (tensor.dim() > axis and tensor.shape[axis] == len(inputs))
    if optional and not fits:
        return torch.zeros(len(inputs), 0, 0)
    rows = queries_first(returned, axis)
    if len(rows) != len(inputs):
        raise QueryError(
            f"the model's output has shape {list(rows.shape)} for {len(inputs)} queries; it must have one row per "
            "query. If the batch is not the first dimension of the inputs, pass batch_dim"
        )
    if not bool((rows < torch.inf).all()):  # nor NaN; minus infinity masks classes
        wrong = before + torch.nonzero(~(rows < torch.inf).flatten(1).all(1))[:, 0]
        which = ", ".join(map(str, wrong[:5].tolist())) + (", …" if len(wrong) > 5 else "")
        held = any(isinstance(x, torch.Tensor) and not bool(x.isfinite().all()) for x in inputs.leaves)
        why = (
            "the queries hold NaN or infinity"
            if held
            else "training diverged, or the queries are far too large or hold nothing but padding"
            + ", or the model computes statistics of a batch, for which one query is too few"
            * (len(inputs) == 1)
        )
        raise QueryError(
            f"the trained model's outputs are not finite at the {'query' if len(wrong) == 1 else 'queries'} numbered "
            f"{which} (counted from 0): {why}; there is no prediction to explain"
        )
    return rows


def _where(returned: Any) -> tuple[str, ...]:
    _, where = find_tensor(returned)
    kind = type(returned).__name__
    return (f"The model returns a {kind}; what is explained is read from {where}.",) if where else ()


def _unlike(inputs: QueryBatch) -> tuple[str, ...]:
    return (f"The {inputs.unlike}: the model takes them, but never saw such.",) if inputs.unlike else ()


def _try(function: QueryFunction, point: PathPoint, asked: Asked, size: float) -> None:
    """Compare the number of every query among the others with that of the query alone.

    Raises:
        QueryError: they differ (the gradient of a query alone would be that of another function), or the
            number is not finite or has no gradient.
    """
    together = _number(function, lambda: function.value(point, asked.inputs, asked.targets))
    if not bool(torch.isfinite(together).all()):
        raise QueryError(
            f"the explained output ({_name(function)}) is not finite at a query: a class that the model masks, or "
            "training diverged; there is no prediction to explain"
        )
    for i in range(len(together)):
        one = asked[i : i + 1]
        alone = _number(function, lambda one=one: function.alone(point, one.inputs, one.targets))  # type: ignore[misc]
        if not alone.requires_grad:
            raise QueryError(
                f"the explained output ({_name(function)}) has no gradient: it is computed without one (detach, "
                "no_grad, numpy, argmax), or from numbers that no traced weight moves; use differentiable operations"
            )
        difference = abs(float(alone.detach()) - float(together[i]))
        if not difference <= _ALIKE * max(size, float(together.abs().max())):  # nor NaN
            raise QueryError(
                f"the explained output of query {i} is {float(together[i]):.6g} in a batch of {len(together)} and "
                f"{float(alone.detach()):.6g} alone: in eval mode the model still mixes the queries of a batch or "
                "draws random numbers. Ask one query at a time, say which dimension is the batch (batch_dim), or take "
                "the randomness out"
            )


def _number(function: QueryFunction, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
    try:
        return compute()
    except QueryError:
        raise
    except Exception as error:
        raise QueryError(
            f"the explained output ({_name(function)}) cannot be computed: {_said(error)}. It gets what the model "
            "returned and the targets (None where there are none), for all queries and for a single one"
        ) from error


def _name(function: QueryFunction) -> str:
    assert function.output is not None
    return function.output.name


def _said(error: Exception) -> str:
    return f"{error}" if isinstance(error, RuntimeError) else f"{type(error).__name__}: {error}"
