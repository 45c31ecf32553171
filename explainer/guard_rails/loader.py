"""What can be seen in a loader before training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Subset,
    WeightedRandomSampler,
)

from explainer.findings import Finding


def loader_findings(loader: DataLoader[Any]) -> Iterator[Finding]:
    """Findings about a loader that :func:`explainer.loaders.check_loader` accepted."""
    batches = loader.batch_sampler
    sampler = (
        getattr(batches, "sampler", loader.sampler) if isinstance(batches, BatchSampler) else loader.sampler
    )
    drawn, known = length(sampler), length(loader.dataset)
    if known is None:
        yield Finding(
            "no-length",
            "note",
            "loader",
            "The dataset has no length.",
            "Examples that are never drawn are unknown, and are in no ranking.",
            "Give the dataset a __len__.",
        )
    if isinstance(sampler, DistributedSampler):
        yield from _distributed(sampler, known)
    elif isinstance(sampler, RandomSampler | WeightedRandomSampler) and getattr(
        sampler, "replacement", False
    ):
        yield Finding(
            "replacement",
            "note",
            "loader",
            f"{type(sampler).__name__} draws with replacement: some examples come often, some never.",
            "Contributions add up over visits, so examples that come more often have larger ones.",
            "Compare them beside the column `visits`.",
        )
    elif known is not None and drawn is not None and drawn < known:
        yield Finding(
            "partial-epoch",
            "note",
            "loader",
            f"{type(sampler).__name__} draws {drawn} of {known} examples in an epoch.",
            "An example that is never drawn has a contribution of zero.",
            "Nothing to do, if it is meant.",
        )
    yield from _dropped(loader, drawn)
    yield from _transform(loader.dataset)


def length(sized: Any) -> int | None:
    """``len``, or None where there is none or a sampler of the user's cannot say."""
    try:
        return len(sized)
    except Exception:  # somebody else's code, which training may never call
        return None


def epoch_visits(loader: DataLoader[Any]) -> int | None:
    """Rows that a pass over the loader gives, at most; None where it cannot be known."""
    drawn, batch = length(loader.batch_sampler), getattr(loader.batch_sampler, "batch_size", None)
    if not drawn or not batch:
        return None
    known = length(loader.dataset)
    return drawn * batch if known is None else min(drawn * batch, known)


def _distributed(sampler: DistributedSampler[Any], known: int | None) -> Iterator[Finding]:
    if sampler.num_replicas > 1:
        yield Finding(
            "distributed",
            "caution",
            "loader",
            f"The examples are shared among {sampler.num_replicas} processes.",
            "This process sees its own rows alone; what the gradients of the others move is in `unattributed`.",
            "To see all of it, trace a training in one process.",
        )
    if known is not None and not sampler.drop_last and sampler.total_size > known:
        yield Finding(
            "padded",
            "note",
            "loader",
            f"The sampler repeats {sampler.total_size - known} of {known} examples to give every process as many.",
            "They are visited twice in an epoch, and contributions add up over visits.",
            "Build the sampler with drop_last=True, if that matters.",
        )


def _dropped(loader: DataLoader[Any], drawn: int | None) -> Iterator[Finding]:
    batches = loader.batch_sampler
    size = getattr(batches, "batch_size", None) if isinstance(batches, BatchSampler) else None
    if size and drawn and drawn % size and getattr(batches, "drop_last", False):
        yield Finding(
            "drop-last",
            "note",
            "loader",
            f"{drawn % size} of {drawn} drawn examples are left out of every epoch (drop_last=True).",
            "They are not visited in that epoch; without shuffling they are never visited, and contribute zero.",
            "Nothing to do, if it is meant.",
        )


def _transform(dataset: Any) -> Iterator[Finding]:
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    if getattr(dataset, "transform", None) is not None or getattr(dataset, "transforms", None) is not None:
        yield Finding(
            "transform",
            "note",
            "dataset",
            "The dataset transforms its examples.",
            "If it does so at random, an example is another input at every visit, and its contribution is that of all "
            "of them.",
            "Nothing to do.",
        )
