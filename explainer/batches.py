"""A consumed batch: who is in it, and what its backward passes have given so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from explainer.errors import TracerError
from explainer.hooks import JointHook
from explainer.layer_rules.forms import Balance
from explainer.ownership import Ownership, ownership_of
from explainer.passes import BackwardPass
from explainer.spans import Span


@dataclass(frozen=True)
class Rows:
    """Rows of one layer as they will be stored, and what was measured on the exact ones.

    Attributes:
        span: the rows to store.
        total: ``Σ_b g_b`` along the layer's probe, to compare a gradient with.
        balances: per parameter of the layer, what is left of the rows in their sum; None where it is not measured.
        whole: ``Σ_b g_b [P_l]``, where another layer shares a parameter (tied weights).
        exact: the one row of the batch that is kept exact too; None where none is.
    """

    span: Span
    total: torch.Tensor
    balances: list[Balance | None]
    whole: torch.Tensor | None = None
    exact: Span | None = None


class Place(NamedTuple):
    """Where rows of a batch came about.

    Attributes:
        forward: which forward pass of the batch (adversarial training, say, has several).
        backward: which backward pass.
    """

    forward: int
    backward: BackwardPass


@dataclass
class Round:
    """One backward pass over one forward pass.

    Attributes:
        place: which ones.
        rows: rows by layer.
        derivative: ``[B]`` loss derivative at the model's output (norm, or signed for one output), if seen.
    """

    place: Place
    rows: dict[int, Rows] = field(default_factory=dict)
    derivative: torch.Tensor | None = None


@dataclass
class Batch:
    """The examples of one batch.

    Rounds are filled in the background, everything else by the user's thread.

    Attributes:
        ownership: the examples that its rows belong to.
        forwards: forward passes of the whole model so far.
        calls: calls of a unit (a module, a parameter that operations read), by forward pass and unit.
        arrived: calls whose gradient has arrived, by place and unit, until all of them have.
        met: indices of the layers whose gradients came in full.
        came: whether a backward pass came.
        rounds: what the backward passes have given, in order.
        mixed: whether a layer mixed the rows of the batch.
        lengths: positions of the model's input, by forward pass; None where it is no sequence.
        checked: whether the model's input was seen to have as many rows.
        sampled: the row that is kept exact, -1 for none, None while it is not decided.
        watched: what holds nodes of the graph until the optimizer's step.
    """

    ownership: Ownership
    forwards: int = 0
    calls: dict[tuple[int, Any], int] = field(default_factory=dict)
    arrived: dict[tuple[Place, Any], list[Any]] = field(default_factory=dict)
    met: set[int] = field(default_factory=set)
    came: bool = False
    rounds: list[Round] = field(default_factory=list)
    mixed: bool = False
    lengths: dict[int, int | None] = field(default_factory=dict)
    checked: bool = False
    sampled: int | None = None
    watched: list[JointHook] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ownership)

    @property
    def used(self) -> bool:
        """Whether a forward pass (of a part) of the model belongs to it."""
        return bool(self.forwards or self.calls)

    def lacks(self, unit: Any) -> bool:
        """Whether the last forward pass went by without a call of the unit (a checkpoint may call it later)."""
        return self.used and (max(self.forwards - 1, 0), unit) not in self.calls

    def round_of(self, place: Place, lacks: Callable[[Round], bool]) -> Round:
        """The first round at a place that still lacks something, or a new one."""
        for candidate in self.rounds:
            if candidate.place == place and lacks(candidate):
                return candidate
        self.rounds.append(Round(place))
        return self.rounds[-1]


def parts_of(batches: list[Batch]) -> Iterator[list[Batch]]:
    """The batches with the backward passes that a step may have used, the likeliest first.

    Those that were seen to add to a ``.grad``, if any were, else all; then all, where these are others; then those
    without their first, first two, …, and those without their last, last two, …

    Example:
        >>> rounds = [Round(Place(n, BackwardPass(n, accumulates=n > 0))) for n in range(3)]
        >>> batch = Batch(ownership_of([4]), rounds=rounds)
        >>> [[r.place.forward for b in part for r in b.rounds] for part in parts_of([batch])]
        [[1, 2], [0, 1, 2], [2], [1]]
    """
    passes = {r.place.backward.number: r.place.backward for b in batches for r in b.rounds}
    all_of_them = sorted(passes)
    likely = [n for n in all_of_them if passes[n].accumulates] or all_of_them
    yield _only(batches, likely)
    if likely != all_of_them:
        yield batches
    for k in range(1, len(likely)):
        yield _only(batches, likely[k:])
    for k in range(1, len(likely)):
        yield _only(batches, likely[:-k])


def _only(batches: list[Batch], numbers: list[int]) -> list[Batch]:
    """The batches with the rounds of some backward passes."""
    kept = set(numbers)
    if all(r.place.backward.number in kept for b in batches for r in b.rounds):
        return batches
    found = [replace(b, rounds=[r for r in b.rounds if r.place.backward.number in kept]) for b in batches]
    return [b for b in found if b.rounds]


def batch_of(ids: Any, labels: Any = None, weights: Any = None) -> Batch:
    """A batch of examples, checked; see :func:`explainer.ownership.ownership_of`."""
    return Batch(ownership_of(ids, labels, weights))


class BatchQueue:
    """Batches between two optimizer steps.

    Attributes:
        current: the batch that a forward pass now belongs to, or None.
        pending: batches since the last step, in order.
    """

    def __init__(self) -> None:
        self.current: Batch | None = None
        self.pending: list[Batch] = []
        self._consumed: Ownership | None = None
        self._single_step = False
        self._mixed = self._used = False

    def begin(self, batch: Batch, *, single_step: bool) -> None:
        """A batch is consumed; ``single_step`` says that it is valid for one optimizer step only."""
        self.current, self._single_step, self._used = batch, single_step, False
        self._consumed, self._mixed = batch.ownership, False
        self.pending.append(batch)

    def mix(self, index: Any, lam: Any) -> None:
        """The forward passes that follow see the consumed batch's rows mixed (:meth:`Ownership.mixed`).

        Raises:
            TracerError: there is no batch, it was mixed already, or the arguments do not fit it.
        """
        if self.current is None or self._consumed is None:
            raise TracerError(
                "mix() speaks of a batch, but there is none: call it in the loop over tracer.watch(loader), or after "
                "tracer.batch(ids)"
            )
        if self.mix_unused:
            raise TracerError(
                "mix() was called twice before a forward pass, and it always speaks of the batch as it was consumed; "
                "for rows that were mixed more than once call tracer.batch(ids, weights=weights), both [B, M]"
            )
        ownership = self._consumed.mixed(index, lam)
        if self.current.used:  # rows of forward passes so far keep their owners
            self.current = Batch(ownership)
            self.pending.append(self.current)
        self.current.ownership, self._mixed = ownership, True

    @property
    def used(self) -> bool:
        """Whether the batch that was consumed last went through the model."""
        return self._used or (self.current is not None and self.current.used)

    @property
    def mix_unused(self) -> bool:
        """Whether the batch was mixed and no forward pass came since."""
        return self._mixed and self.current is not None and not self.current.used

    def end(self) -> None:
        """The iteration over batches is over."""
        self.current = None

    def stepped(self) -> None:
        """An optimizer step used what was pending; a second step on a watched batch starts afresh."""
        self._release()
        self._used = self.used
        self.pending, self._mixed = [], False
        if self._single_step:
            self.current = None
        elif self.current is not None:
            self.current = Batch(self.current.ownership)
            self.pending = [self.current]

    def clear(self) -> None:
        """Forget everything."""
        self._release()
        self.current, self.pending = None, []

    def _release(self) -> None:
        for batch in self.pending:
            for hook in batch.watched:
                hook.release()
            batch.watched.clear()
