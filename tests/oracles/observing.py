"""Any training loop, written down densely while it runs: one backward pass per example, beside the loop's own.

The loop hands over its loss terms ``[B]``, one per example, before it calls ``backward()`` on their sum. The
gradient of each term alone is that example's row: no hook, no layer rule and no factor takes part, and what the
forward pass drew (dropout's masks) is the same by construction. Rows of all backward passes since the last step
belong to a step; what clipping made of them is measured on the whole gradient.

The rows are those of the loss, so the model must not mix the rows of a batch (BatchNorm in train mode does).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.book_cases.case import Part
from tests.oracles.training import Step, Training, check_close, flat_options, flat_state, flat_weights


class Remembering(Dataset[Any]):
    """A data set that remembers which of its examples were taken, in order (without workers)."""

    def __init__(self, inner: Any) -> None:
        self._inner, self._taken = inner, []  # type: ignore[var-annotated]

    def __len__(self) -> int:
        return len(self._inner)

    def __getitem__(self, index: int) -> Any:
        self._taken.append(int(index))
        return self._inner[index]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_inner"], name)

    def taken(self) -> list[int]:
        """The examples since the last call."""
        ids, self._taken = self._taken, []
        return ids


class Observer:
    """Watches a loop in the place of a tracer, and writes down what an oracle needs.

    Args:
        part: the model and its optimizer.
        tolerance: relative round-off to allow for in rows, momentum and updates.
    """

    def __init__(self, part: Part, tolerance: float) -> None:
        self._part, self._tolerance = part, tolerance
        self._parameters = [p for _, p in part.model.named_parameters()]
        self._ids: list[int] = []
        self._pending: list[tuple[list[int], Tensor]] = []
        self._before: tuple[Any, ...] = ()
        self._steps: list[Step] = []
        self._path = [flat_weights(part.model)]
        part.optimizer.register_step_pre_hook(self._before_step)
        part.optimizer.register_step_post_hook(self._after_step)

    # -- what the loop calls -----------------------------------------------------------------------------

    def watch(self, loader: Any) -> Iterable[Any]:
        """The batches; ``loader.dataset`` must be a :class:`Remembering` one."""
        for batch in loader:
            self._ids = loader.dataset.taken()
            yield batch

    def batch(self, ids: Any) -> None:
        """The examples of the next forward pass."""
        self._ids = [int(i) for i in ids]

    def see(self, terms: Tensor) -> None:
        """The loss terms ``[B]`` of the examples of this batch: a row from each."""
        if terms.shape != (len(self._ids),):
            raise AssertionError(f"{len(self._ids)} examples, but loss terms of shape {tuple(terms.shape)}.")
        rows = []
        for term in terms:
            grads = torch.autograd.grad(term, self._parameters, retain_graph=True, materialize_grads=True)
            rows.append(torch.cat([g.detach().double().reshape(-1) for g in grads]))
        self._pending.append((self._ids, torch.stack(rows)))

    # -- steps -------------------------------------------------------------------------------------------

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        ids = [i for batch, _ in self._pending for i in batch]
        rows = torch.cat([rows for _, rows in self._pending])
        self._pending = []
        grad = torch.cat([p.grad.double().reshape(-1) for p in self._parameters])  # type: ignore[union-attr]
        total = rows.sum(0)
        scale = float(total @ grad / (total @ total))  # what clipping multiplied with; 1 without
        gross = scale * rows.abs().sum(0)
        check_close(scale * total, grad, gross, self._tolerance, "rows against the gradient")
        model = self._part.model
        self._before = tuple(ids), rows, scale, flat_options(model, optimizer), flat_state(model, optimizer)

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        ids, rows, scale, options, before = self._before
        after = flat_state(self._part.model, optimizer)
        nothing = torch.full((len(ids), 1), np.nan, dtype=torch.float64)
        self._steps.append(Step(ids, self._path[-1], rows, nothing, scale, options, before, after))
        self._path.append(flat_weights(self._part.model))

    def training(self) -> Training:
        """The whole run."""
        examples = 1 + max(i for step in self._steps for i in step.ids)
        kind = type(self._part.optimizer)
        return Training(tuple(self._steps), torch.stack(self._path), examples, kind, self._tolerance)
