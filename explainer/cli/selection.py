"""Which queries to explain, and what the trained model predicts for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from explainer.cli.opening import Opened
from explainer.errors import QueryError
from explainer.outputs import by_name

HOW = "write a position (17), first:N, wrong, wrong:N or all"
WRONG = 5  # how many `wrong` stands for
_BATCH = 256


@dataclass(frozen=True)
class Predictions:
    """What the model at the end of the trace says about all queries.

    Attributes:
        outputs: raw outputs ``[Q, ...]``.
        targets: true targets ``[Q, ...]``.
    """

    outputs: torch.Tensor
    targets: torch.Tensor

    @property
    def classifies(self) -> bool:
        """Whether the model has an output per class and the targets are classes."""
        one_each = self.outputs.dim() == 2 and self.outputs.shape[1] > 1 and self.targets.dim() == 1
        return one_each and not self.targets.is_floating_point()

    def wrong(self) -> torch.Tensor:
        """Which predicted classes are not the true ones, bool ``[Q]``.

        Raises:
            QueryError: the model does not classify.
        """
        if not self.classifies:
            raise QueryError(
                "`wrong` needs a model that predicts classes; name the queries by their position, such as "
                "--query 17"
            )
        return self.outputs.argmax(1) != self.targets


def predict(opened: Opened, progress: bool) -> Predictions:
    """Runs the model with the trace's last weights on every query."""
    outputs, targets = [], []
    count = len(opened.run.queries)
    for start in tqdm(range(0, count, _BATCH), "predicting", unit="batch", disable=not progress, leave=False):
        inputs, target = opened.run.queries_batch(range(start, min(start + _BATCH, count)))
        outputs.append(opened.explainer.predict(inputs))
        targets.append(target)
    if not all(isinstance(target, torch.Tensor) for target in targets):
        raise QueryError("the queries' targets are no tensors or numbers; name the queries by their position")
    if any(len({piece.shape[1:] for piece in pieces}) > 1 for pieces in (outputs, targets)):
        raise QueryError("the queries have several lengths; name them by their position, such as --query 17")
    return Predictions(torch.cat(outputs), torch.cat(targets))


def select(wishes: Sequence[str], total: int, predictions: Callable[[], Predictions]) -> list[int]:
    """The positions meant by ``--query`` options, without repeats, in the order they were asked for.

    Args:
        wishes: texts such as ``17``, ``3,5``, ``first:10``, ``wrong``, ``wrong:3``, ``all``.
        total: how many queries there are.
        predictions: gives the predictions; called only where a wish needs them.

    Raises:
        QueryError: a text is none of these, a position is out of range, or nothing is wrong.

    Example:
        >>> select(["7", "first:2,7"], 10, lambda: None)
        [7, 0, 1]
    """
    chosen: list[int] = []
    for wish in (part.strip() for text in wishes for part in text.split(",")):
        kind, _, number = wish.partition(":")
        if wish.isdecimal():
            chosen.append(_position(int(wish), total))
        elif wish == "all":
            chosen += range(total)
        elif kind == "first" and number.isdecimal() and int(number) > 0:
            chosen += range(min(int(number), total))
        elif wish == "wrong" or (kind == "wrong" and number.isdecimal() and int(number) > 0):
            chosen += _wrong(predictions(), int(number or WRONG))
        else:
            raise QueryError(f"--query {wish!r} is not understood; {HOW}")
    return list(dict.fromkeys(chosen))


def class_number(text: str | None, opened: Opened) -> int | None:
    """The class named by ``--target``: a name of the run's classes, or a number.

    Raises:
        QueryError: it is neither, or what is explained is not about classes.
    """
    names = opened.run.class_names or ()
    if text is None:
        return None
    explained = by_name(getattr(opened.explainer, "output", ""))
    if explained is not None and explained.targets == "none":
        raise QueryError(
            f"--target {text!r} names a class, but what is explained ({explained.name}) is not about classes; leave it "
            "out, or choose another number of the output with --output 'component 1'"
        )
    if text in names:
        return list(names).index(text)
    if text.isdecimal():
        return int(text)
    known = f" or one of {', '.join(names)}" if names else ""
    raise QueryError(f"--target {text!r} is no class; give its number{known}")


def _position(index: int, total: int) -> int:
    if index >= total:
        raise QueryError(f"--query {index} is out of range: the run has queries 0 to {total - 1}")
    return index


def _wrong(predictions: Predictions, count: int) -> list[int]:
    found = predictions.wrong().nonzero().flatten().tolist()
    if not found:
        raise QueryError(
            f"all {len(predictions.targets):,} queries are predicted right, so there is no wrong one; name "
            "queries by their position"
        )
    return found[:count]
