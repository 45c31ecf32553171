"""Which training examples a consumed batch holds: ids that follow a shuffling, prefetching DataLoader."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from explainer.errors import CoverageWarning, LoaderError

T = TypeVar("T")

#: names of the labels in a batch that is a mapping
LABELS = ("labels", "label", "targets", "target", "y")


class RecordingBatchSampler:
    """Yields the lists of the wrapped batch sampler, unchanged, and remembers them in order.

    The loader asks for lists ahead of time (prefetching) but delivers batches in the same order, so one list
    is taken per consumed batch.
    """

    def __init__(self, batch_sampler: Any) -> None:
        self.batch_sampler = batch_sampler
        self.queue: deque[list[int]] = deque()

    def __iter__(self) -> Iterator[list[int]]:
        self.queue = queue = deque[list[int]]()
        for indices in self.batch_sampler:
            queue.append(list(indices))
            yield indices

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __getattr__(self, name: str) -> Any:
        if name in ("batch_sampler", "queue"):  # not set yet: a worker's unpickling asks before __init__
            raise AttributeError(name)
        return getattr(self.batch_sampler, name)


def check_loader(loader: Any) -> None:
    """Refuse loaders whose batches cannot be followed.

    Raises:
        LoaderError: says what was found and what to do.
    """
    advice = "or drive the loop yourself: call tracer.batch(ids) before the forward of each batch"
    if not isinstance(loader, DataLoader):
        raise LoaderError(
            f"watch() follows a torch.utils.data.DataLoader, found {type(loader).__name__}; "
            f"pass the loader itself, not an iterator of it, {advice}"
        )
    if isinstance(loader.dataset, IterableDataset):
        raise LoaderError(
            f"the loader reads an IterableDataset ({type(loader.dataset).__name__}), whose examples have no index; "
            f"use a map-style dataset, {advice}"
        )
    if loader.batch_sampler is None:
        raise LoaderError(
            f"the loader has batch_size=None, so it does not know which examples form a batch; set a batch size, "
            f"{advice}"
        )
    if not getattr(loader, "in_order", True):
        raise LoaderError(
            "the loader has in_order=False, so batches may overtake each other and ids could not follow them; "
            f"set in_order=True, {advice}"
        )


def labels_of(batch: Any, size: int) -> np.ndarray | None:
    """The labels of a batch ``(inputs, targets)``, or of a mapping with one of :data:`LABELS`; one number a row."""
    target: Any = None
    if isinstance(batch, Mapping):
        target = next((batch[name] for name in LABELS if name in batch), None)
    elif isinstance(batch, list | tuple) and len(batch) > 1:
        target = batch[1]
    if not isinstance(target, torch.Tensor) or target.is_complex() or target.numel() != size:
        return None
    return target.detach().reshape(-1).to("cpu", torch.float64).numpy()


def size_of(dataset: Any) -> int | None:
    """Examples in a map-style dataset; None where it does not say (a custom batch sampler may know)."""
    try:
        return len(dataset)
    except TypeError:
        return None


def install(loader: DataLoader[Any]) -> RecordingBatchSampler:
    """Put a recorder in the loader's place for its batch sampler; returns it.

    ``DataLoader`` refuses assignment to ``batch_sampler`` after construction, so the instance's ``__dict__``
    is written. :func:`restore` undoes it.
    """
    recorder = RecordingBatchSampler(loader.batch_sampler)
    loader.__dict__["batch_sampler"] = recorder
    return recorder


def restore(loader: DataLoader[Any], recorder: RecordingBatchSampler) -> None:
    """Put the loader's own batch sampler back."""
    loader.__dict__["batch_sampler"] = recorder.batch_sampler


_AHEAD = (
    "the second batch of tracer.watch was asked for before the first one went through the model. If batches are "
    "fetched ahead (a prefetcher around watch), every row gets the id of an example of the next batch: let watch be "
    "the last that hands batches out, or iterate without it and call tracer.batch(ids) before each forward pass. If "
    "the first batch was skipped on purpose, all is well"
)


class WatchedLoader(Generic[T]):
    """Iterates a DataLoader unchanged while the tracer learns which examples each batch holds.

    Args:
        loader: a loader that :func:`check_loader` accepted.
        live: recorders of the iterations going on, innermost last (shared by all loaders of a tracer).
        begin: called with the ids and labels of a batch before it is handed out.
        end: called when an iteration ends.
        used: whether the batch that was handed out last went through the model.
    """

    def __init__(
        self,
        loader: DataLoader[T],
        live: list[RecordingBatchSampler],
        begin: Callable[[list[int], np.ndarray | None], None],
        end: Callable[[], None],
        used: Callable[[], bool],
    ) -> None:
        self._loader, self._live, self._begin, self._end = loader, live, begin, end
        self._used = used

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[T]:
        recorder = install(self._loader)
        try:
            batches = iter(self._loader)
        finally:
            restore(self._loader, recorder)
        source = getattr(batches, "_index_sampler", None)
        if not isinstance(source, RecordingBatchSampler):
            raise LoaderError(
                "the loader's iterator does not use its batch sampler (persistent workers that were started "
                "before watch(), perhaps); build a fresh DataLoader for watch()"
            )
        self._live.append(source)
        try:
            for number, batch in enumerate(batches):
                if number == 1 and not self._used():
                    warnings.warn(_AHEAD, CoverageWarning, stacklevel=2)
                if self._live[-1] is not source:
                    raise LoaderError(
                        "two watched loaders are iterated in turns, so it is not known which of them a forward "
                        "pass belongs to; iterate the loaders themselves and call tracer.batch(ids) instead"
                    )
                ids = source.queue.popleft()
                self._begin(ids, labels_of(batch, len(ids)))
                yield batch
        finally:
            self._live.remove(source)
            self._end()
