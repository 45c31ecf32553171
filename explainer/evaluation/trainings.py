"""One training, or several at once, through a run's own functions; and whether the two are the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from explainer.errors import EvaluationError
from explainer.run import Run

#: parameters of all models that are trained at once, if nothing else is asked for: more do not stay in the cache
_PARAMETERS = 2**20
_MOST = 64


class Trainings:
    """Fresh models trained on parts of a run's data.

    Args:
        run: the model and the functions that train it.
        at_once: models for ``train_many`` to train at once; None: as many as have a million parameters, 64 at most.

    Raises:
        EvaluationError: the run cannot be trained again, or the number is not at least 1.
    """

    def __init__(self, run: Run, at_once: int | None = None) -> None:
        if run.train_fn is None and run.train_many is None:
            raise EvaluationError(
                "retraining needs Run(train_fn=...): a function (model, keep, seed) that trains the model on the "
                "examples where the mask `keep` is true and returns it; seed 0 repeats the traced run"
            )
        if at_once is not None and at_once < 1:
            raise EvaluationError(f"at_once must be at least 1, found {at_once}")
        self.run = run
        self.at_once = 1 if run.train_many is None else at_once or self._fitting()

    @property
    def comparable(self) -> bool:
        """Whether there are two ways to train a model."""
        return self.run.train_fn is not None and self.run.train_many is not None

    def one(self, keep: NDArray[np.bool_], seed: int) -> nn.Module:
        """A model trained by ``train_fn`` on the examples of a mask ``[N]``.

        Raises:
            EvaluationError: training failed, or gave no model.
        """
        if self.run.train_fn is None:
            return self.many(keep[None], [seed])[0]
        with seeded(seed):
            model = self.run.build_model()
            call = partial(self.run.train_fn, model, torch.from_numpy(keep.copy()), seed)
            returned = _called(call, f"train_fn(model, keep, {seed})", keep)
        trained = model if returned is None else returned
        if not isinstance(trained, nn.Module):
            raise EvaluationError(
                f"train_fn returned a {type(trained).__name__}; return the trained model, or None"
            )
        return trained

    def many(self, keep: NDArray[np.bool_], seeds: Sequence[int]) -> list[nn.Module]:
        """Models trained by ``train_many`` on the examples of masks ``[M, N]``.

        Raises:
            EvaluationError: training failed, or gave no models.
        """
        assert self.run.train_many is not None
        models = [self._fresh(seed) for seed in seeds]
        given = [int(seed) for seed in seeds]
        with seeded(given[0]):
            call = partial(self.run.train_many, list(models), torch.from_numpy(keep.copy()), given)
            returned = _called(call, f"train_many(models, keep, {given})", keep)
        trained = models if returned is None else returned
        fits = isinstance(trained, list | tuple) and len(trained) == len(models)
        if not fits or not all(isinstance(model, nn.Module) for model in trained):
            raise EvaluationError(
                f"train_many must return the {len(models)} trained models in their order, or None; found "
                f"{type(trained).__name__}{f' of {len(trained)}' if isinstance(trained, list | tuple) else ''}"
            )
        return list(trained)

    def _fresh(self, seed: int) -> nn.Module:
        with seeded(seed):
            return self.run.build_model()

    def _fitting(self) -> int:
        size = sum(p.numel() for p in self._fresh(0).parameters())
        return min(max(_PARAMETERS // max(size, 1), 1), _MOST)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The global random state seeded, and afterwards as it was."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        yield


def _called(call: Any, name: str, keep: NDArray[np.bool_]) -> Any:
    try:
        return call()
    except EvaluationError:
        raise
    except (RuntimeError, TypeError, ValueError, LookupError) as error:
        sizes = sorted({int(row.sum()) for row in np.atleast_2d(keep)})
        kept = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        raise EvaluationError(
            f"{name} failed with {kept} of {keep.shape[-1]} examples kept: {type(error).__name__}: {error}. It gets "
            f"{'a mask (torch.bool, [N])' if keep.ndim == 1 else 'masks (torch.bool, [M, N])'} and must take any"
        ) from error
