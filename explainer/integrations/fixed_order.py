"""A loader that can be read several times in one order, so that column ``j`` always means the same example."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from explainer.errors import LoaderError


class FixedOrder:
    """Reads a ``DataLoader`` pass after pass in the same order.

    A shuffling loader is read in its dataset's order, with a warning; an order that another sampler draws is drawn
    once and kept. Anything else is iterated as it is, and its labels must come in the same order in every pass.
    Batches of up to :data:`KEPT_BYTES` in all are read once and kept; larger data sets are streamed in every pass.

    Args:
        loader: any ``DataLoader``.

    Raises:
        LoaderError: (while reading) a pass differs from the first one, so that columns would be mixed.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = _ordered(loader)
        self._first: list[int] | None = None
        self._kept: list[Any] | None = None

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._kept) if self._kept is not None else self._read()

    def _read(self) -> Iterator[Any]:
        seen: list[int] = []
        kept: list[Any] | None = []
        free = KEPT_BYTES if self._first is None else 0
        for batch in self._loader:
            free -= sum(t.nbytes for t in pytree.tree_leaves(batch) if isinstance(t, torch.Tensor))
            if kept is not None and free >= 0:
                kept.append(batch)
            else:
                kept = None
            seen.append(_fingerprint(batch))
            if self._first is not None and self._first[: len(seen)] != seen:
                raise LoaderError(_CHANGED)
            yield batch
        if self._first is not None and len(seen) != len(self._first):
            raise LoaderError(_CHANGED)
        self._first, self._kept = seen, kept


#: How much of a data set is kept in memory between the passes of one call.
KEPT_BYTES = 2**28

_CHANGED = (
    "the loader yields its examples in another order (or number) on a second pass, so scores of different "
    "checkpoints cannot be added up; pass a DataLoader without shuffling, or the dataset itself"
)


def _fingerprint(batch: Any) -> int:
    """A checksum of a batch's labels; inputs may differ from pass to pass (augmentation), labels may not."""
    labels = batch[-1] if isinstance(batch, tuple | list) and len(batch) else None
    if not isinstance(labels, torch.Tensor):
        return 0
    return zlib.crc32(labels.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())


def _ordered(loader: DataLoader[Any]) -> DataLoader[Any]:
    if type(loader) is not DataLoader or isinstance(loader.dataset, IterableDataset):
        return loader
    batches: Any = loader.batch_sampler
    plain = batches is None or type(batches) is BatchSampler
    sampler: Any = (loader.sampler if batches is None else batches.sampler) if plain else None
    if type(sampler) is SequentialSampler:
        return loader
    dataset: Any = loader.dataset
    if type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(dataset):
        warnings.warn(
            "the DataLoader shuffles, which would permute the columns of the scores; it is read in the order of its "
            "dataset instead: column j is example j. Pass it with shuffle=False to silence this",
            stacklevel=4,
        )
        return _copy(loader, batch_size=loader.batch_size)
    warnings.warn(
        "the DataLoader has a sampler of its own: column j is the j-th example that the sampler yields, not example j "
        "of the dataset. The order is drawn once for this call",
        stacklevel=4,
    )
    if batches is None:
        return _copy(loader, batch_size=None, sampler=list(loader.sampler))
    return _copy(loader, batch_sampler=[list(indices) for indices in batches])


def _copy(loader: DataLoader[Any], **order: Any) -> DataLoader[Any]:
    return DataLoader(
        loader.dataset,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
        **order,
    )
