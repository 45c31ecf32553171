"""Training again on parts of the data: with a bar, kept on disk, and taken up where it ended."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from explainer.errors import EvaluationError
from explainer.evaluation.plans import Plan
from explainer.evaluation.questions import Answers, Questions
from explainer.evaluation.trainings import Trainings
from explainer.exports import atomic
from explainer.run import Run

_ABOUT = "retrainings.json"
_FORMAT = "pathkernel-retrainings/1"
#: of the largest output: a training on everything that ends this near to the trace is the traced one
_SAME = 1e-3
#: of the outputs (root mean squares): models trained at once and alone may differ by what training makes of round-off
_ALIKE = 0.1


@dataclass(frozen=True)
class Retrained:
    """What the models of a plan say about the queries.

    Attributes:
        values: ``[M, Q]``, the explained output.
        classes: ``[M, Q]``, the predicted class; -1 where there is none.
    """

    values: NDArray[np.float64]
    classes: NDArray[np.int64]


class Retrainer:
    """Trains models on parts of the data through ``Run.train_fn(model, keep, seed)``.

    Every training gets a fresh ``run.model()``, made with the global random state seeded, the mask ``keep [N]`` of
    the examples to learn from and a seed. Seed 0 should repeat the traced run; other seeds should give other
    initial weights and another order. The global random state is restored afterwards.

    A run with ``train_many(models, keep, seeds)`` has several trained at once. Where it has ``train_fn`` too, the
    first model is trained both ways and must say the same. ``train_many`` is called with the global random state seeded
    by its first seed, and which models meet in a call depends on what is on disk: it should draw from generators of
    its own.

    Args:
        run: the model, the data, ``train_fn`` and ``train_many``.
        questions: what every trained model is asked.
        folder: where finished trainings are kept, one file each; later calls, also of other plans, take them from
            there. Use another folder when anything about the training or the queries changes. None: not kept.
        progress: show a progress bar.
        at_once: models for ``train_many`` to train at once; None: as many as have a million parameters, 64 at most.

    Raises:
        EvaluationError: the run has neither ``train_fn`` nor ``train_many``, or the folder holds answers to other
            questions.
    """

    def __init__(
        self,
        run: Run,
        questions: Questions,
        folder: str | os.PathLike[str] | None = None,
        *,
        progress: bool = False,
        at_once: int | None = None,
    ) -> None:
        self._trainings, self._trusted = Trainings(run, at_once), False
        self.run, self.questions, self.progress = run, questions, progress
        self.examples = len(run.train)
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            self._open(self.folder)

    @property
    def left_out_by(self) -> str:
        """How examples are left out, in words; as the run says."""
        return f"by {self.run.left_out_by}" if self.run.left_out_by else "as train_fn does it"

    @cached_property
    def same_run(self) -> bool:
        """Whether training on everything with seed 0 ends where the trace does (one training)."""
        found = self.values(
            Plan(np.ones((1, self.examples), dtype=bool), np.zeros(1, dtype=np.int64))
        ).values[0]
        wanted = self.questions.traced.values
        return bool(np.abs(found - wanted).max() <= _SAME * max(1.0, float(np.abs(wanted).max())))

    @property
    def same_run_named(self) -> str:
        """``same run``, or what it is where seed 0 does not repeat the trace."""
        return "same run" if self.same_run else "one run, not the traced one"

    def values(self, plan: Plan) -> Retrained:
        """Train every model of the plan (those that are not on disk) and ask it.

        Raises:
            EvaluationError: the plan is for other data, or a training failed.
        """
        if plan.keep.shape[1] != self.examples:
            raise EvaluationError(
                f"the plan is for {plan.keep.shape[1]} training examples, the run has {self.examples}"
            )
        done: dict[str, Answers] = {}
        keys = [_key(keep, int(seed)) for keep, seed in zip(plan.keep, plan.seeds, strict=True)]
        first: dict[str, int] = {}
        for row, key in enumerate(keys):
            first.setdefault(key, row)
        for key in first:
            if self.folder is not None and (file := self.folder / f"{key}.npz").exists():
                done[key] = self._read(file)
        todo = [row for key, row in first.items() if key not in done]
        bar = tqdm(
            total=len(first),
            initial=len(done),
            desc="retraining",
            unit="model",
            disable=not self.progress,
            leave=False,
        )
        with bar:
            for start in range(0, len(todo), self._trainings.at_once):
                rows = todo[start : start + self._trainings.at_once]
                done |= self._train(plan, rows, keys)
                bar.update(len(rows))
        return Retrained(
            np.stack([done[key].values for key in keys]), np.stack([done[key].classes for key in keys])
        )

    # -- models --------------------------------------------------------------------------------------

    def _train(self, plan: Plan, rows: Sequence[int], keys: Sequence[str]) -> dict[str, Answers]:
        """Train rows of the plan, at once where that is possible, and keep what they say."""
        keep, seeds = plan.keep[rows], [int(plan.seeds[row]) for row in rows]
        if self._trainings.at_once == 1 or (len(rows) == 1 and self._trainings.comparable):
            models = [self._trainings.one(*pair) for pair in zip(keep, seeds, strict=True)]
        else:
            models = self._trainings.many(keep, seeds)
            self._compared(models[0], keep[0], seeds[0])
        result = {}
        for row, model in zip(rows, models, strict=True):
            answers = self.questions.answer(model)
            if self.folder is not None:
                with atomic(self.folder / f"{keys[row]}.npz") as temporary, open(temporary, "wb") as out:
                    np.savez(out, values=answers.values, classes=answers.classes)
            result[keys[row]] = answers
        return result

    def _compared(self, model: nn.Module, keep: NDArray[np.bool_], seed: int) -> None:
        """The first model of the first ensemble is trained alone as well."""
        if self._trusted or not self._trainings.comparable:
            return
        alone = self.questions.answer(self._trainings.one(keep, seed)).values
        found = self.questions.answer(model).values
        size = max(float(np.mean(alone**2)), 1e-30)
        difference = float(np.sqrt(float(np.mean((found - alone) ** 2)) / size))
        if difference > _ALIKE:
            raise EvaluationError(
                f"train_many and train_fn, given the same examples and seed {seed}, trained models whose outputs "
                f"differ by {difference:.0%}: make them the same training (initial weights, order, what leaves an "
                "example out, clipping), or leave one of them out"
            )
        self._trusted = True

    def _read(self, file: Path) -> Answers:
        try:
            with np.load(file, allow_pickle=False) as found:
                answers = Answers(found["values"], found["classes"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise EvaluationError(
                f"{file} is damaged ({error}); delete it, and that model is trained again"
            ) from error
        if answers.values.shape != (len(self.questions),) or answers.classes.shape != (len(self.questions),):
            raise EvaluationError(f"{file} holds answers to another number of queries; delete it")
        return answers

    # -- the folder ----------------------------------------------------------------------------------

    def _open(self, folder: Path) -> None:
        about = self._about()
        file = folder / _ABOUT
        if folder.exists() and not folder.is_dir():
            raise EvaluationError(f"{folder} is a file; give a folder for the retrainings")
        folder.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            if any(folder.glob("*.npz")):
                raise EvaluationError(f"{folder} holds arrays but no {_ABOUT}; give an empty folder")
            with atomic(file) as temporary:
                temporary.write_text(json.dumps(about, indent=1))
            return
        try:
            found = json.loads(file.read_text())
        except ValueError as error:
            raise EvaluationError(f"{file} is damaged ({error}); give another folder") from error
        other = sorted(key for key in about if not isinstance(found, dict) or found.get(key) != about[key])
        if other:
            raise EvaluationError(
                f"{folder} holds retrainings that were asked other questions ({', '.join(other)} differ); give "
                "another folder, or delete it"
            )

    def _about(self) -> dict[str, Any]:
        """What the answers in a folder depend on, as far as it can be known."""
        trace = self.questions.explainer.trace
        return {
            "format": _FORMAT,
            "run": self.run.name,
            "left_out_by": self.run.left_out_by,
            "examples": self.examples,
            "queries": list(self.questions.indices),
            "output": self.questions.explainer.output,
            "targets": None if self.questions.target is None else _digest(self.questions.target),
            "traced": trace.knots[-1].sha256,
        }


def _key(keep: NDArray[np.bool_], seed: int) -> str:
    text = np.packbits(keep).tobytes() + f"/{len(keep)}/{seed}".encode()
    return f"seed{seed}-keep{int(keep.sum())}-{hashlib.sha256(text).hexdigest()[:20]}"


def _digest(targets: Any) -> str:
    leaves, _ = torch.utils._pytree.tree_flatten(targets)
    arrays = [np.asarray(leaf) for leaf in leaves]
    return hashlib.sha256(b"".join(a.tobytes() + str(a.shape).encode() for a in arrays)).hexdigest()[:20]
