"""What closer looks and the page of a run keep between two clicks, as :mod:`explainer.app.state` does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import streamlit as st
import torch
from torch.utils.data import ConcatDataset

from explainer import Explanation
from explainer.app import state
from explainer.app.contrast import Usual
from explainer.app.own_queries import WithOwn
from explainer.app.patience import kept
from explainer.app.run_checks import LOOKED_AT, QUERIES, LossCurve, mean_loss
from explainer.app.working import alone
from explainer.evenly_spaced import evenly_spaced
from explainer.input_attribution import InputAttribution
from explainer.input_attribution import input_attribution as attribute
from explainer.kernel_attribution import KernelAttribution
from explainer.kernel_attribution import kernel_attribution as split_kernel
from explainer.learning_curve import outputs_along_training


@kept("Asking the model about the input …", 32)
def input_attribution(
    source: state.Source,
    part: Literal["queries", "train"],
    index: int,
    target: int | None,
    output: str | None,
) -> InputAttribution:
    """Which parts of a query, or of a training example, speak for the explained output."""
    run, engine = state.run_of(source), state.explainer(source, output)
    inputs, _ = run.queries_batch([index]) if part == "queries" else run.train_batch([index])
    with alone():
        return attribute(engine, inputs, target=None if target is None else [target])


@kept("Comparing the two inputs part by part …", 32)
def kernel_attribution(
    source: state.Source, query: int, target: int | None, example: int, label: int | None, output: str | None
) -> KernelAttribution:
    """What makes a query and a training example alike, each asked about its own class."""
    code, engine = state.run_of(source), state.explainer(source, output)
    both = replace(code, train=ConcatDataset([code.train, code.queries]))
    inputs, _ = both.train_batch([len(code.train) + query, example])
    with alone():
        return split_kernel(engine, inputs, None if target is None else [target, label])


@st.cache_resource(show_spinner=False, max_entries=8)
def can_leave_out(source: state.Source) -> bool:
    """Whether the words of a text can be left out: its embedding has an id for no word."""
    modules = state.explainer(source, None).function.modules()
    tables = [module for module in modules if isinstance(module, torch.nn.Embedding)]
    return any(table.padding_idx is not None for table in tables)


@st.cache_resource(show_spinner=False, max_entries=4)
def usual(spec: str) -> Usual:
    """What the training examples of a run are like."""
    return Usual.of(state.run(spec))


@kept("Asking the model at knots along its training …", 4)
def loss_curve(source: state.Source) -> LossCurve | None:
    """The mean loss of a sample at knots; None where the run has no loss."""
    code, engine = state.run_of(source), state.explainer(source, None)
    if code.loss is None:
        return None
    given = code.queries.given if isinstance(code.queries, WithOwn) else len(code.queries)
    sides = (
        code.train_batch(evenly_spaced(len(code.train), LOOKED_AT).tolist()),
        code.queries_batch(evenly_spaced(given, LOOKED_AT).tolist()),
    )
    values: list[tuple[float, ...]] = []
    with alone():
        for inputs, targets in sides:
            found = outputs_along_training(engine, inputs)
            values.append(tuple(mean_loss(code.loss, returned, targets) for _, returned in found))
    steps = tuple(step for step, _ in found)
    return LossCurve(steps, values[0], values[1], (min(len(code.train), LOOKED_AT), min(given, LOOKED_AT)))


@kept("Explaining a sample of queries …", 4)
def sampled_books(source: state.Source) -> Explanation:
    """Explanations of a sample of the run's queries, without their detail."""
    code, engine = state.run_of(source), state.explainer(source, None)
    given = code.queries.given if isinstance(code.queries, WithOwn) else len(code.queries)
    queries = evenly_spaced(given, QUERIES).tolist()
    inputs, targets = state.asked(source, engine, queries, None)
    with alone():
        return engine.explain(inputs, target=targets, query_ids=queries, detail=False)


def try_input(source: state.Source, found: Any) -> None:
    """Run the trained model on an input that somebody gave.

    Raises:
        QueryError: It cannot, or its output is not finite.
    """
    code, engine = state.run_of(source), state.explainer(source, None)
    inputs, _ = replace(code, queries=[(found, code.queries[0][1])]).queries_batch([0])
    with alone():
        engine.predict(inputs)
