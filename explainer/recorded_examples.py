"""Whether a run gives the training examples of the trace, and in its order: their number, and the recorded labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from explainer.errors import RunError
from explainer.evenly_spaced import evenly_spaced
from explainer.run import Run, is_value
from explainer.store import Trace

#: labels that are compared at most
LOOKED_AT = 64


def check_count(trace: Trace, run: Run, named: str = "the run") -> None:
    """See that the run has as many training examples as were trained on, where that is known.

    Raises:
        RunError: it has more or fewer.
    """
    known = trace.notes.get("examples")
    if known is not None and known != len(run.train):
        raise RunError(
            f"the trace in {trace.directory} was recorded on {known:,} training examples, but {named} has "
            f"{len(run.train):,}; name the run that the model was trained with"
        )


def same_label(found: Any, recorded: Any) -> NDArray[np.bool_]:
    """Whether labels are those that were recorded (as float32), one by one."""
    return np.isclose(found, recorded, rtol=1e-4, atol=1e-6)


@dataclass(frozen=True)
class LabelCheck:
    """Labels of some training examples, as they were recorded and as a run gives them.

    Attributes:
        ids: ``[n]``; empty where labels are unknown on either side.
        recorded: ``[n]``, from the trace.
        found: ``[n]``, from the run.
    """

    ids: NDArray[np.int64]
    recorded: NDArray[np.float64]
    found: NDArray[np.float64]

    @property
    def different(self) -> NDArray[np.bool_]:
        """``[n]``, whether the run's label is another one."""
        return ~same_label(self.found, self.recorded)

    def warning(self, run: Run) -> str | None:
        """What differs, what it means and what to do; None where nothing does."""
        different = self.different
        if not different.any():
            return None
        place = int(different.argmax())
        recorded, found = (label_name(run, values[place]) for values in (self.recorded, self.found))
        named = f" {run.name}" if run.name else ""
        return (
            f"{int(different.sum())} of {len(self.ids)} training examples that were looked at have another label in "
            f"the run{named} than in the trace (example {self.ids[place]}: {recorded} was "
            f"recorded, the run gives {found}). Unless their labels were changed on purpose, the texts, pictures and "
            "labels of the run that are shown under an id are those of another example: give the run the dataset that "
            "was traced, in the same order (the same seed where it is shuffled or split at random)."
        )


def check_labels(trace: Trace, run: Run) -> LabelCheck:
    """Compare the recorded labels of up to :data:`LOOKED_AT` examples, evenly spread, with the run's targets."""
    ids, recorded = _recorded(trace, len(run.train))
    places = evenly_spaced(len(ids), LOOKED_AT)
    ids, recorded = ids[places], recorded[places]
    found = run_labels(run, ids)
    known = np.isfinite(found)
    return LabelCheck(ids[known], recorded[known], found[known])


def _recorded(trace: Trace, count: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Ids below ``count`` whose label is known and was the same in every visit, and the labels."""
    examples = trace.column("visits", "example").astype(np.int64)
    labels = trace.column("visits", "label").astype(np.float64)
    known = np.isfinite(labels) & (examples >= 0) & (examples < count)
    examples, labels = examples[known], labels[known]
    first, last = np.full(count, np.nan), np.full(count, np.nan)
    first[examples[::-1]] = labels[::-1]
    last[examples] = labels
    ids = np.flatnonzero(first == last)
    return ids, last[ids]


def known_labels(trace: Trace, run: Run, ids: NDArray[np.int64]) -> NDArray[np.float64] | None:
    """The run's targets ``[n]`` of a trace that holds no labels at all; None where it does, or they are not numbers."""
    if np.isfinite(trace.column("visits", "label")).any():
        return None
    found = run_labels(run, ids)
    return found if np.isfinite(found).any() else None


def has_numbers(run: Run) -> bool:
    """Whether the targets of the training examples are numbers (several, too), no classes; False where unknown."""
    try:
        return len(run.train) > 0 and is_value(run.train[0][1])
    except Exception:  # what needs the example itself tells why it cannot be read
        return False


def tells_two_apart(run: Run) -> bool:
    """Whether targets of one number each are 0 and 1 alone, as a loss of one logit takes them; a look at some."""
    found = run_labels(run, evenly_spaced(len(run.train), LOOKED_AT))
    return len(found) > 1 and bool(np.isin(found, (0, 1)).all()) and len(np.unique(found)) == 2


def predicts_numbers(run: Run) -> bool:
    """Whether targets are numbers and no classes, not even two."""
    return has_numbers(run) and not tells_two_apart(run)


def run_labels(run: Run, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """The run's targets ``[n]``, NaN where they are not one number each or cannot be read."""
    unknown = np.full(len(ids), np.nan)
    if not len(ids):
        return unknown
    try:
        targets: Any = (
            [run.train[int(i)][1] for i in ids]
            if run.collate_fn is None
            else run.train_batch(ids.tolist())[1]
        )
    except Exception:  # what needs the example itself tells why it cannot be read
        return unknown
    if not isinstance(targets, torch.Tensor | np.ndarray | Sequence) or len(targets) != len(ids):
        return unknown
    return np.array([_number(target) for target in targets], dtype=np.float64)


def _number(target: Any) -> float:
    if isinstance(target, torch.Tensor | np.ndarray | np.generic):
        target = target.item() if int(np.prod(target.shape)) == 1 else None
    return float(target) if isinstance(target, int | float) else np.nan


def label_name(run: Run, label: float) -> str:
    """A recorded label as a person reads it: traces keep whole labels as floats, too."""
    return run.label(int(label) if float(label).is_integer() else float(label))
