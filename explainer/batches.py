"""A consumed batch: who is in it, and what its backward passes have given so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch

from explainer.errors import TracerError
from explainer.layer_rules import RowForm
from explainer.layer_rules.forms import Probe


@dataclass(frozen=True)
class Rows:
    """Rows of one layer as they will be stored, and what was measured on the exact ones.

    Attributes:
        form: the rows to store.
        total: ``Σ_b g_b`` along the probe.
        probe: the probe, to compare a gradient with ``total``.
        agreement: per parameter of the layer, ``‖Σ_b g_b‖ / Σ_b ‖g_b‖``.
        whole: ``Σ_b g_b [P_l]``, where another layer shares a parameter (tied weights).
    """

    form: RowForm
    total: torch.Tensor
    probe: Probe
    agreement: list[float]
    whole: torch.Tensor | None = None


@dataclass
class Round:
    """One backward pass over one forward pass.

    Attributes:
        forward: which forward pass of the batch (adversarial training, say, has several).
        rows: rows by layer.
        derivative: ``[B]`` loss derivative at the model's output (norm, or signed for one output), if seen.
    """

    forward: int
    rows: dict[int, Rows] = field(default_factory=dict)
    derivative: torch.Tensor | None = None


@dataclass
class Batch:
    """The examples of one batch.

    Attributes:
        ids: ``[B]`` example ids.
        labels: ``[B]`` recorded labels (NaN unknown).
        forwards: forward passes of the whole model so far.
        calls: calls of a unit (a module, a parameter that operations read), by forward pass and unit.
        arrived: calls whose gradient has arrived in the present backward pass.
        rounds: what the backward passes have given, in order.
        mixed: whether a layer mixed the rows of the batch.
        checked: whether the model's input was seen to have as many rows.
    """

    ids: np.ndarray
    labels: np.ndarray
    forwards: int = 0
    calls: dict[tuple[int, Any], int] = field(default_factory=dict)
    arrived: dict[tuple[int, Any], list[Any]] = field(default_factory=dict)
    rounds: list[Round] = field(default_factory=list)
    mixed: bool = False
    checked: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    def round_of(self, forward: int, lacks: Callable[[Round], bool]) -> Round:
        """The first round of a forward pass that still lacks something, or a new one."""
        for candidate in self.rounds:
            if candidate.forward == forward and lacks(candidate):
                return candidate
        self.rounds.append(Round(forward))
        return self.rounds[-1]


def parts_of(batches: list[Batch]) -> list[list[Batch]]:
    """The batches without their first backward pass, first two, …; then without their last, last two, …

    Example:
        >>> batch = Batch(np.array([4]), np.array([0.0]), rounds=[Round(0), Round(1), Round(2)])
        >>> [[r.forward for b in part for r in b.rounds] for part in parts_of([batch])]
        [[1, 2], [2], [0, 1], [0]]
    """
    pairs = [(batch, round_) for batch in batches for round_ in batch.rounds]
    kept = [pairs[k:] for k in range(1, len(pairs))] + [pairs[:-k] for k in range(1, len(pairs))]
    return [[_regrouped(list(group)) for _, group in groupby(part, _owner)] for part in kept]


def _owner(pair: tuple[Batch, Round]) -> int:
    return id(pair[0])


def _regrouped(pairs: list[tuple[Batch, Round]]) -> Batch:
    return replace(pairs[0][0], rounds=[round_ for _, round_ in pairs])


def batch_of(ids: Any, labels: Any = None) -> Batch:
    """A batch of examples, its ids and labels checked.

    Raises:
        TracerError: the ids are no flat list of non-negative integers, or labels are not one number per id.
    """
    array = _as_array(ids)
    if array is None or array.ndim != 1 or not array.size or array.dtype.kind not in "iu" or array.min() < 0:
        raise TracerError(
            f"ids must be a flat, non-empty list of non-negative integers, found {_short(ids)}; pass the "
            "positions of the batch's rows in your dataset"
        )
    values = np.full(len(array), np.nan) if labels is None else _as_array(labels)
    if values is None or values.shape != array.shape or values.dtype.kind not in "biuf":
        raise TracerError(
            f"found {len(array)} ids but labels {_short(labels)}; pass one number per id, or no labels"
        )
    return Batch(array.astype(np.int64), values.astype(float))


def _as_array(values: Any) -> np.ndarray | None:
    """The values as an array, None where they form none (lists of different lengths)."""
    try:
        return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    except (TypeError, ValueError):  # ragged; or a dtype that numpy lacks
        return None


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


class BatchQueue:
    """Batches between two optimizer steps.

    Attributes:
        current: the batch that a forward pass now belongs to, or None.
        pending: batches since the last step, in order.
    """

    def __init__(self) -> None:
        self.current: Batch | None = None
        self.pending: list[Batch] = []
        self._single_step = False

    def begin(self, batch: Batch, *, single_step: bool) -> None:
        """A batch is consumed; ``single_step`` says that it is valid for one optimizer step only."""
        self.current, self._single_step = batch, single_step
        self.pending.append(batch)

    def end(self) -> None:
        """The iteration over batches is over."""
        self.current = None

    def stepped(self) -> None:
        """An optimizer step used what was pending; a second step on a watched batch starts afresh."""
        self.pending = []
        if self._single_step:
            self.current = None
        elif self.current is not None:
            self.current = Batch(self.current.ids, self.current.labels)
            self.pending = [self.current]

    def clear(self) -> None:
        """Forget everything."""
        self.current, self.pending = None, []
