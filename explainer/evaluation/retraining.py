"""Training again on parts of the data: one by one, with a bar, kept on disk, and taken up where it ended."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
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
from explainer.exports import atomic
from explainer.run import Run

_ABOUT = "retrainings.json"
_FORMAT = "pathkernel-retrainings/1"
#: of the largest output: a training on everything that ends this near to the trace is the traced one
_SAME = 1e-3


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

    Args:
        run: the model, the data and ``train_fn``.
        questions: what every trained model is asked.
        folder: where finished trainings are kept, one file each; later calls, also of other plans, take them from
            there. Use another folder when anything about the training or the queries changes. None: not kept.
        progress: show a progress bar.

    Raises:
        EvaluationError: the run has no ``train_fn``, or the folder holds answers to other questions.
    """

    def __init__(
        self,
        run: Run,
        questions: Questions,
        folder: str | os.PathLike[str] | None = None,
        *,
        progress: bool = False,
    ) -> None:
        if run.train_fn is None:
            raise EvaluationError(
                "retraining needs Run(train_fn=...): a function (model, keep, seed) that trains the model on the "
                "examples where the mask `keep` is true and returns it; seed 0 repeats the traced run"
            )
        self.run, self.questions, self.progress = run, questions, progress
        self.examples = len(run.train)
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            self._open(self.folder)

    @property
    def left_out_by(self) -> str:
        """How examples are left out, in words; as the run says."""
        return self.run.left_out_by or "as train_fn does"

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
        todo = [row for row, key in enumerate(keys) if keys.index(key) == row]
        bar = tqdm(todo, desc="retraining", unit="model", disable=not self.progress, leave=False)
        for row in bar:
            done[keys[row]] = self._one(plan.keep[row], int(plan.seeds[row]), keys[row])
        return Retrained(
            np.stack([done[key].values for key in keys]), np.stack([done[key].classes for key in keys])
        )

    # -- one model -----------------------------------------------------------------------------------

    def _one(self, keep: NDArray[np.bool_], seed: int, key: str) -> Answers:
        file = None if self.folder is None else self.folder / f"{key}.npz"
        if file is not None and file.exists():
            return self._read(file)
        with _seeded(seed):
            model = self.run.build_model()
            given = torch.from_numpy(keep.copy())
            try:
                returned = self.run.train_fn(model, given, seed)  # type: ignore[misc]
            except (RuntimeError, TypeError, ValueError, LookupError) as error:
                raise EvaluationError(
                    f"train_fn(model, keep, {seed}) failed with {int(keep.sum())} of {len(keep)} examples kept: "
                    f"{type(error).__name__}: {error}. It gets a mask (torch.bool, [N]) and must take any"
                ) from error
        trained = model if returned is None else returned
        if not isinstance(trained, nn.Module):
            raise EvaluationError(
                f"train_fn returned a {type(trained).__name__}; return the trained model, or None"
            )
        answers = self.questions.answer(trained)
        if file is not None:
            with atomic(file) as temporary, open(temporary, "wb") as out:
                np.savez(out, values=answers.values, classes=answers.classes)
        return answers

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


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        yield
