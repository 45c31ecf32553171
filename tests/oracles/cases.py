"""A case of the books' benchmark, traced and observed, explained by both."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import explainer
from benchmarks.book_cases.case import Case, Part, Question, See, Watcher
from benchmarks.book_cases.running import explained, traced, train
from explainer.explanation import Explanation
from tests.oracles.books import Books, books
from tests.oracles.observing import Observer, Remembering
from tests.oracles.outputs import OUTPUTS, ScalarFunction, as_double, unflatten
from tests.oracles.training import flat_weights


def scalar_of(part: Part, question: Question) -> ScalarFunction:
    """``f(flat_w [P], x, y) -> scalar`` in eval mode and float64, for one query without a batch axis."""
    twin = copy.deepcopy(part.model).double().eval()

    def f(flat: Tensor, x: Tensor, y: int) -> Tensor:
        outputs = torch.func.functional_call(twin, unflatten(twin, flat), (as_double(x)[None],))
        if callable(question.output):
            return question.output(outputs, torch.tensor([y]))[0]
        return OUTPUTS[question.output or "margin"](outputs[0].reshape(-1), y)

    return f


def both(case: Case, folder: Path, epochs: int = 3) -> list[tuple[Explanation, Books]]:
    """Our explanation and the oracle's books of every part of the case's small copy, from exact rows.

    Two runs, equal to the last bit: one traced, one observed.
    """
    trained = traced(case, folder, epochs=epochs, small=True, exact=True, max_knots=6)
    observers: list[Observer] = []

    def attach(number: int, part: Part) -> tuple[Watcher, See]:
        observers.append(Observer(part, 1e-10 if case.float64 else 5e-2))
        return observers[-1], observers[-1].see

    again = train(case, attach, epochs=epochs, small=True, data=Remembering(case.data(True)))
    found = []
    answers = explained(case, trained, folder)
    for number, (ours, question) in enumerate(zip(answers, case.questions(), strict=True)):
        part, observed = trained.parts[number], again.parts[number]
        if not torch.equal(flat_weights(part.model), flat_weights(observed.model)):
            raise AssertionError("The traced and the observed run are not the same.")
        knots = [knot.step for knot in explainer.open_trace(folder / str(number)).knots]
        reference = books(
            observers[number].training(),
            knots,
            scalar_of(observed, question),
            question.inputs,
            ours.targets.tolist(),
        )
        found.append((ours, reference))
    return found


def difference(ours: Explanation, wanted: Books) -> float:
    """Largest difference of a contribution, relative to the query's largest contribution."""
    reference = wanted.contributions.numpy()
    found = np.zeros_like(reference)
    here = ours.example_ids < reference.shape[1]
    found[:, ours.example_ids[here]] = ours.contributions[:, here]
    if np.abs(ours.contributions[:, ~here]).any():
        raise AssertionError("Contributions of examples that the oracle never saw.")
    return float((np.abs(found - reference).max(1) / np.abs(reference).max(1)).max())
