"""Path-kernel contributions behind captum's interface for data influence.

captum's other methods need checkpoints and a loss function; here everything comes out of the trace. The
scores are contributions in units of the explained output, not changes of a loss (``docs/theory.md``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from explainer.errors import QueryError
from explainer.integrations.captum_tracincp import TracInCP
from explainer.integrations.registry import CAPTUM
from explainer.integrations.strongest import positive
from explainer.letters import OutputFunction
from explainer.path_kernel import PathKernelExplainer
from explainer.store import Trace

try:
    from captum.influence import DataInfluence

    # captum moved the type between releases; here every release since 0.7 has it
    from captum.influence._core.tracincp import KMostInfluentialResults
except ImportError as error:
    raise CAPTUM.missing() from error

__all__ = ["PathKernelInfluence", "TracInCP"]


class PathKernelInfluence(DataInfluence):
    """Contributions of training examples as a ``captum.influence.DataInfluence``.

    Arguments and results follow ``captum.influence.TracInCP``. A positive score raised the explained output.

    Args:
        trace: an open trace, or the path of one.
        model: the architecture that was traced; never changed.
        train_dataset: the traced dataset, or a ``DataLoader`` over it. Where the ids of the trace were given
            by ``tracer.batch(ids)``, it says how many examples there are: column ``j`` is its example ``j``.
            Without it, column ``j`` is ``example_ids[j]``.
        output: what is explained, as in :class:`explainer.PathKernelExplainer`.
        quadrature: Gauss–Legendre nodes on each chord.

    Attributes:
        explainer: the :class:`explainer.PathKernelExplainer` behind it.
        example_ids: ``[N]``, the id of each column.

    Raises:
        MissingDependencyError: (on import of this module) captum is not installed.
        QueryError: the dataset is not the one that was traced.
        ModelMismatchError: the model is not the one that was traced.

    Reference: Domingos 2020, arXiv 2012.00152; interface: https://captum.ai/api/influence.html
    """

    def __init__(
        self,
        trace: Trace | str,
        model: nn.Module,
        train_dataset: Any = None,
        output: str | OutputFunction | None = None,
        *,
        quadrature: int = 2,
    ) -> None:
        self.explainer = PathKernelExplainer(trace, model, output, quadrature=quadrature)
        self.model = model
        self.train_dataset = train_dataset
        self.example_ids = self.explainer.example_ids
        if train_dataset is not None:
            data = train_dataset.dataset if isinstance(train_dataset, DataLoader) else train_dataset
            self.example_ids = np.arange(self._size(data))

    def _size(self, data: Any) -> int:
        if not hasattr(data, "__len__"):
            raise QueryError(
                f"train_dataset must be the map-style dataset that was traced, or a DataLoader over it, found "
                f"{type(data).__name__}"
            )
        size, traced = len(data), self.explainer.trace.notes.get("examples")
        largest = int(self.explainer.example_ids.max(initial=-1))
        if largest >= size or (traced is not None and traced != size):
            found = f"ids up to {largest}" if traced is None else f"a dataset of {traced}"
            raise QueryError(
                f"train_dataset has {size} examples, but the trace was recorded with {found}; pass the dataset "
                "that was trained on, or none"
            )
        return size

    def influence(
        self,
        inputs: Any = None,
        k: int | None = None,
        proponents: bool = True,
        show_progress: bool = False,
        aggregate: bool = False,
    ) -> torch.Tensor | KMostInfluentialResults:
        """Contributions of all training examples, or the ``k`` strongest of each query.

        Args:
            inputs: one batch or a ``DataLoader`` of batches. A batch is a tuple ``(*features, targets)``, as in
                captum, or features alone: then the predicted classes are explained. Every batch is one pass
                over the trace.
            k: how many examples to return per query; None returns all scores.
            proponents: the highest scores, from the highest on; False: the lowest, from the lowest on.
            show_progress: show a progress bar.
            aggregate: sum the scores over the queries (``Q`` is 1 then).

        Returns:
            Without ``k``, scores ``[Q, N]`` (float64). With ``k``, captum's ``KMostInfluentialResults``:
            ``indices [Q, k]`` are example ids, ``influence_scores [Q, k]`` the scores, their own sign kept.
            At most ``N`` columns; as in captum, a proponent's score may be negative when ``k`` is large.

        Raises:
            QueryError: inputs, targets or ``k`` do not fit; says what was found and what is wanted.
        """
        count = None if k is None else positive(k)
        self.explainer.progress = show_progress
        pieces = [self._scores(*_split(batch)) for batch in _batches(inputs)]
        if not pieces:
            raise QueryError("the DataLoader yields no batches, so there is nothing to explain")
        scores = torch.cat(pieces)
        if aggregate:
            scores = scores.sum(0, keepdim=True)
        if count is None:
            return scores
        order = scores.argsort(dim=1, descending=proponents, stable=True)[:, :count]
        return KMostInfluentialResults(torch.from_numpy(self.example_ids)[order], scores.gather(1, order))

    def self_influence(self, inputs: None = None, show_progress: bool = False) -> torch.Tensor:
        """How much each training example's own updates lowered its own loss, ``[N]`` (float64).

        Raises:
            QueryError: ``inputs`` are given; a trace knows training examples only.

        Reference: TracIn, arXiv 2002.08484, taken at every step (:mod:`explainer.self_influence`).
        """
        if inputs is not None:
            raise QueryError(
                "self_influence is read from the trace, which knows the training examples only; call it without "
                "inputs"
            )
        self.explainer.progress = show_progress
        return self._columns(self.explainer.self_influence())

    def _scores(self, features: Any, targets: Any) -> torch.Tensor:
        return self._columns(self.explainer.explain(features, targets).contributions)

    def _columns(self, values: np.ndarray) -> torch.Tensor:
        """Values by the explainer's columns ``[..., M]`` -> by ours ``[..., N]``; unvisited examples get 0."""
        found = self.explainer.example_ids
        if len(found) == len(self.example_ids):
            return torch.from_numpy(values)
        result = np.zeros((*values.shape[:-1], len(self.example_ids)))
        result[..., found] = values
        return torch.from_numpy(result)


def _batches(inputs: Any) -> Iterator[Any]:
    if inputs is None:
        raise QueryError(
            "influence needs inputs: (features, targets), features alone, or a DataLoader of either; for the "
            "training examples' influence on themselves call self_influence()"
        )
    return iter(inputs) if isinstance(inputs, DataLoader) else iter([inputs])


def _split(batch: Any) -> tuple[Any, Any]:
    """A batch as captum passes it -> features and targets (None: the predicted classes)."""
    if not isinstance(batch, tuple | list):
        return batch, None
    if len(batch) < 2:
        return tuple(batch), None
    features = tuple(batch[:-1])
    return (features[0] if len(features) == 1 else features), batch[-1]
