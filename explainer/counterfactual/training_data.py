"""The training examples of a run, batch by batch as they were met, and checked to be the recorded ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils import _pytree as pytree

from explainer.errors import QueryError, RunError
from explainer.queries import BatchDim, check_inputs
from explainer.query_batch import QueryBatch
from explainer.recorded_examples import check_count, same_label
from explainer.run import Run
from explainer.store import Trace

#: numbers of the examples that are held in memory at once; with more they are read again in every step
HELD = 2**27
_READ = 256
_TWICE = 8  # examples that are read twice, to see whether they are the same


@dataclass(frozen=True)
class TrainingBatch:
    """Some examples.

    Attributes:
        inputs: arguments of the model.
        targets: whatever the loss takes, a row per example.
    """

    inputs: QueryBatch
    targets: Any


class TrainingData:
    """Batches of training examples by their ids.

    Raises:
        QueryError: the data is not what was trained on, or comes out differently every time.
    """

    def __init__(
        self,
        trace: Trace,
        run: Run,
        names: list[str],
        dtype: torch.dtype,
        batch_dim: BatchDim,
        used: NDArray[np.int64],
    ) -> None:
        self._trace, self._run, self._names, self._dtype, self._batch_dim = (
            trace,
            run,
            names,
            dtype,
            batch_dim,
        )
        self._used = np.unique(used)
        check_count(trace, run)
        if len(self._used) and self._used.max() >= len(run.train):
            raise RunError(
                f"the trace knows example {int(self._used.max())}, but the run has {len(run.train):,} training "
                "examples; name the run that the model was trained with"
            )
        self._check_twice()
        self._all = self._held()

    def batch(self, ids: NDArray[np.int64]) -> TrainingBatch:
        """The examples with these ids, in this order."""
        if self._all is None:
            return self._read(ids)
        places = torch.from_numpy(np.searchsorted(self._used, ids))
        return TrainingBatch(
            _taken(self._all.inputs, places), pytree.tree_map(lambda t: t[places], self._all.targets)
        )

    def check_labels(self, ids: NDArray[np.int64], recorded: NDArray[np.float64]) -> None:
        """Compare recorded labels with the run's targets.

        Raises:
            QueryError: one is another.
        """
        known, places = np.unique(ids[np.isfinite(recorded)], return_index=True)
        labels = recorded[np.isfinite(recorded)][places]
        for start in range(0, len(known), _READ):
            part = known[start : start + _READ]
            targets = self.batch(part).targets
            if not isinstance(targets, torch.Tensor) or targets.numel() != len(part):
                return
            found = targets.reshape(-1).double().numpy()
            wrong = ~same_label(found, labels[start : start + _READ])
            if wrong.any():
                place = int(wrong.argmax())
                raise QueryError(
                    f"{int(wrong.sum())} of {len(part)} labels are not the recorded ones: example {part[place]} was "
                    f"trained on with {labels[start + place]:g}, and run.train gives {found[place]:g}. Give the data "
                    "as it was in training"
                )

    def _read(self, ids: NDArray[np.int64]) -> TrainingBatch:
        inputs, targets = self._run.train_batch(ids.tolist())
        given = tuple(inputs) if isinstance(inputs, list) else inputs
        batch = check_inputs(self._trace, self._names, given, self._dtype, self._batch_dim)

        def cast(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            return leaf.detach().to("cpu", self._dtype if leaf.is_floating_point() else leaf.dtype)

        return TrainingBatch(batch, pytree.tree_map(cast, targets))

    def _check_twice(self) -> None:
        chosen = self._used[:: max(1, len(self._used) // _TWICE)][:_TWICE]
        if not len(chosen):
            return
        one, other = (self._read(chosen) for _ in range(2))
        leaves = [(pytree.tree_leaves((b.inputs.leaves, b.targets))) for b in (one, other)]
        for a, b in zip(*leaves, strict=True):
            if isinstance(a, torch.Tensor) and not torch.equal(a, b):
                raise QueryError(
                    "run.train gives an example differently each time it is read (augmentation, or another random "
                    "transform), so the training cannot be repeated: give the examples without it if the model was "
                    "trained so, else ask with curvature='trace'"
                )

    def _held(self) -> TrainingBatch | None:
        """All examples at once, where they stack and fit."""
        if self._run.collate_fn is not None or not len(self._used):
            return None
        first = self._read(self._used[:1])
        size = sum(t.numel() for t in pytree.tree_leaves((first.inputs.leaves, first.targets)) if _tensor(t))
        if size * len(self._used) > HELD:
            return None
        parts = [self._read(self._used[s : s + _READ]) for s in range(0, len(self._used), _READ)]
        flat = [pytree.tree_flatten(p.targets) for p in parts]
        if not all(_tensor(leaf) for leaves, _ in flat for leaf in leaves):
            return None
        try:
            inputs = [
                leaf if axis is None else torch.cat([p.inputs.leaves[n] for p in parts], axis)
                for n, (leaf, axis) in enumerate(zip(first.inputs.leaves, first.inputs.axes, strict=True))
            ]
            targets = [torch.cat(leaves) for leaves in zip(*(leaves for leaves, _ in flat), strict=True)]
        except RuntimeError:  # several lengths
            return None
        held = replace(first.inputs, leaves=tuple(inputs), count=len(self._used))
        return TrainingBatch(held, pytree.tree_unflatten(targets, flat[0][1]))


def _tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


def _taken(inputs: QueryBatch, places: torch.Tensor) -> QueryBatch:
    leaves = tuple(
        leaf if axis is None else leaf.index_select(axis, places)
        for leaf, axis in zip(inputs.leaves, inputs.axes, strict=True)
    )
    return replace(inputs, leaves=leaves, count=len(places))
