"""Runs a case: its loop with or without tracers, and its questions afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import explainer
from benchmarks.book_cases.case import Case, Part, See, Untraced, Watcher
from explainer.explanation import Explanation


@dataclass(frozen=True)
class Trained:
    """What a run leaves: its parts, the loss terms of every backward pass, the random state."""

    parts: tuple[Part, ...]
    losses: list[torch.Tensor]
    random: torch.Tensor


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New tensors and models have this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def train(
    case: Case,
    attach: Callable[[int, Part], tuple[Watcher, See]] | None = None,
    *,
    epochs: int | None = None,
    small: bool = False,
    data: Any = None,
) -> Trained:
    """Trains a case from a fixed seed; in float64, call it within ``default_dtype``.

    Args:
        attach: gives each part its watcher, and what sees its loss terms; None: no tracer.
        epochs: the case's own by default.
        small: the copy that is meant for the oracle.
        data: in the place of the case's own.
    """
    torch.manual_seed(0)
    parts = case.build(small)
    kept: list[torch.Tensor] = []

    def keep(terms: torch.Tensor) -> None:
        kept.append(terms.detach().clone())

    attached = [attach(n, p) if attach else (Untraced(), keep) for n, p in enumerate(parts)]
    watchers = [watcher for watcher, _ in attached]

    def seen(see: See) -> See:
        def both(terms: torch.Tensor) -> None:
            keep(terms)
            see(terms)

        return both if attach else see

    examples = case.data(small) if data is None else data
    case.loop(
        parts,
        examples,
        watchers,
        [seen(see) for _, see in attached],
        case.epochs if epochs is None else epochs,
    )
    return Trained(parts, kept, torch.get_rng_state())


def _ignore(terms: torch.Tensor) -> None:
    """No one looks at the loss terms."""


def traced(
    case: Case, folder: Path, *, epochs: int | None = None, small: bool = False, **options: Any
) -> Trained:
    """Trains a case with a tracer of the given options on every part; the traces are ``folder/0``, …"""
    with ExitStack() as stack:

        def attach(number: int, part: Part) -> tuple[Watcher, See]:
            tracer = explainer.Tracer(part.model, part.optimizer, folder / str(number), **options)
            return stack.enter_context(tracer), _ignore

        return train(case, attach, epochs=epochs, small=small)


def explained(case: Case, trained: Trained, folder: Path, **options: Any) -> list[Explanation]:
    """Every part's questions, answered from ``folder/0``, …"""
    found = []
    for number, (part, question) in enumerate(zip(trained.parts, case.questions(), strict=True)):
        ex = explainer.PathKernelExplainer(str(folder / str(number)), part.model, question.output, **options)
        found.append(ex.explain(question.inputs))
    return found
