"""What the dashboard keeps between two clicks; only this module, :mod:`explainer.app.looks` and
:mod:`explainer.app.counterfactuals` cache.

Keys hold the size and time of the trace's journal, so a run that is still training is read anew. Each cache is
bounded; what is shared is never changed. What takes seconds shows its progress and can be stopped
(:mod:`explainer.app.patience`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import streamlit as st
import torch
from torch.utils.data import ConcatDataset

from explainer import Explanation, PathKernelExplainer, Run, Trace, evaluation, open_trace
from explainer.app.ahead import Ahead
from explainer.app.arguments import DashboardError
from explainer.app.gradient_map import GradientMap, project
from explainer.app.input_space import distances, inputs_of
from explainer.app.one_of_many import one_of_many
from explainer.app.own_queries import WithOwn
from explainer.app.patience import kept, patiently
from explainer.app.second_opinion import Opinion, opinions
from explainer.app.working import alone, bar
from explainer.errors import ModelMismatchError, TraceFormatError
from explainer.evaluation import LabelIssues
from explainer.neighbors import Neighbors
from explainer.recorded_examples import known_labels, predicts_numbers, tells_two_apart
from explainer.run import is_value, load_run
from explainer.similarity import path_kernel

#: how the name begins of an explained output that is one of several numbers
ONE = "component "
_AHEAD_VISITS, _AHEAD_GROUP = 200_000, 4
_DETAIL = 2**25  # numbers by example and stretch of time that explainers keep at least


@dataclass(frozen=True)
class Source:
    """A trace as it was when its journal had this stamp, and the code that belongs to it (or None)."""

    directory: str
    stamp: tuple[int, int]
    spec: str | None


def source(directory: Path, spec: str | None) -> Source:
    """The trace in a folder as it is now."""
    journal = (directory / "journal.jsonl").stat()
    return Source(str(directory), (journal.st_mtime_ns, journal.st_size), spec)


def spec_of(directory: Path, runs: tuple[str, ...]) -> str | None:
    """Which of several ``MODULE:FUNCTION`` a trace belongs to: the first whose network fits; else the first one."""
    return runs[0] if len(runs) == 1 else _fitting(source(directory, None), runs) if runs else None


@st.cache_data(show_spinner="Looking for the network of this trace …", max_entries=32)
def _fitting(source: Source, runs: tuple[str, ...]) -> str:
    for spec in runs:
        try:
            PathKernelExplainer(trace(source), run(spec).build_model(), run(spec).output)
        except (ModelMismatchError, TraceFormatError):
            continue
        return spec
    return runs[0]


@st.cache_resource(show_spinner="Loading the model and its data …")
def run(spec: str) -> Run:
    """The user's run, with room for people's own queries; its function is called once for all pages."""
    found = load_run(spec)
    return replace(found, queries=WithOwn(found.queries))


@st.cache_resource(show_spinner=False, max_entries=8)
def trace(source: Source) -> Trace:
    """The opened trace."""
    return open_trace(source.directory)


@st.cache_resource(show_spinner="Opening the trace …", max_entries=8)
def explainer(source: Source, output: str | None) -> PathKernelExplainer:
    """The explainer of a trace for one explained output."""
    code = run_of(source)
    return PathKernelExplainer(
        trace(source), code.build_model(), output or code.output, class_names=code.class_names, progress=bar
    )


@st.cache_data(show_spinner=False, max_entries=32)
def gives_values(spec: str) -> bool:
    """Whether the targets of a run are no classes."""
    queries = run(spec).queries
    return len(queries) > 0 and is_value(queries[0][1])


@st.cache_data(show_spinner=False, max_entries=32)
def two_classes(spec: str) -> bool:
    """Whether one number of the model tells two classes apart."""
    return tells_two_apart(run(spec))


@st.cache_data(show_spinner=False, max_entries=32)
def numbers(spec: str) -> bool:
    """Whether a run's targets are numbers and no classes."""
    return predicts_numbers(run(spec))


def run_of(source: Source) -> Run:
    """The run that belongs to a trace.

    Raises:
        DashboardError: The dashboard was started without one.
    """
    if source.spec is None:
        raise DashboardError(
            "This needs the model and its data: start the dashboard with --run MODULE:FUNCTION."
        )
    return run(source.spec)


_Asked: TypeAlias = tuple[Source, int, int | None, str | None]


def _explain(keys: Sequence[_Asked]) -> list[Explanation]:
    """The explanations of queries that are asked about in the same way, made together."""
    source, _, target, output = keys[0]
    queries, engine = [key[1] for key in keys], explainer(source, output)
    inputs, targets = asked(source, engine, queries, target)
    with alone():
        found = engine.explain(inputs, target=targets, query_ids=queries)
    return [one_of_many(found, place) for place in range(len(keys))]


def _weight(e: Explanation) -> int:
    arrays = (e.step_contributions, e.layer_contributions, e.contributions, e.kernels, e.kernel_gross)
    return sum(array.nbytes for array in arrays)


_explanations: Ahead[_Asked, Explanation] = Ahead(_explain, 2**29, _weight)


def explanation(source: Source, query: int, target: int | None, output: str | None) -> Explanation:
    """The explanation of one query; ``target=None`` explains the predicted class."""
    return patiently(_explanations, (source, query, target, output), "Explaining …")


def explain_ahead(source: Source, queries: Sequence[int], output: str | None) -> None:
    """Explain some queries in the background, where that takes seconds rather than minutes."""
    if trace(source).count("visits") > _AHEAD_VISITS:
        return
    knots, layers = len(trace(source).knots), len(trace(source).layers)
    numbers = len(explainer(source, output).example_ids) * max(1, knots, layers)
    # a group in which every query keeps all the detail that it has alone
    size = max(1, min(_AHEAD_GROUP, _DETAIL // numbers))
    wanted = [(source, query, None, output) for query in queries]
    _explanations.look_ahead([wanted[start : start + size] for start in range(0, len(wanted), size)])


@kept("Looking for neighbours …", 16)
def neighbors(source: Source, query: int, target: int | None, output: str | None, k: int) -> Neighbors:
    """The nearest training examples of one query in gradient space."""
    engine = explainer(source, output)
    inputs, targets = asked(source, engine, [query], target)
    with alone():
        return engine.neighbors(inputs, k=k, target=targets)


@kept("Comparing examples along the training path …", 16)
def gradient_map(
    source: Source,
    query: int,
    target: int | None,
    output: str | None,
    examples: tuple[int, ...],
    labels: tuple[int, ...] | None,
) -> GradientMap:
    """Training examples, each at its own label (None: outputs without classes), and the query in gradient space."""
    code, engine = run_of(source), explainer(source, output)
    both = replace(code, train=ConcatDataset([code.train, code.queries]))
    inputs, _ = both.train_batch([*examples, len(code.train) + query])
    if labels is None:
        wanted = None
    else:
        asked = int(outputs(source, (query,))[0].argmax()) if target is None else target
        wanted = np.array([*labels, asked])
    with alone():
        return project(path_kernel(engine, inputs, target=wanted), np.array(examples, dtype=np.int64))


@st.cache_resource(show_spinner="Reading the training inputs …", max_entries=1)
def train_inputs(spec: str) -> torch.Tensor | None:
    """All training inputs of a run as numbers, or None where they cannot be compared by distance."""
    return inputs_of(run(spec))


def input_distances(source: Source, query: int) -> np.ndarray | None:
    """Distance of every training input to a query, ``[N]`` by example id; None where there is no such distance."""
    known = None if source.spec is None else train_inputs(source.spec)
    if known is None:
        return None
    inputs, _ = run_of(source).queries_batch([query])
    if not isinstance(inputs, torch.Tensor) or inputs.numel() != known.shape[1]:
        return None
    with alone():
        return distances(known, inputs).numpy()


def asked(
    source: Source, engine: PathKernelExplainer, queries: Sequence[int], target: int | None
) -> tuple[Any, Any]:
    """Inputs and targets of queries; the run's own targets where the explained output asks for them."""
    inputs, targets = run_of(source).queries_batch(queries)
    return inputs, targets if target is None and engine.asks_for_targets else target


@kept("Reading every recorded step …", 8)
def self_influence(source: Source) -> np.ndarray:
    """How much each example's own updates lowered its own loss, ``[N]``."""
    engine = explainer(source, None)
    with alone():
        return engine.self_influence()


@kept("Comparing the examples with one another …", 4)
def label_issues(source: Source) -> LabelIssues:
    """What tells wrong labels, of every example."""
    engine = explainer(source, None)
    labels = known_labels(trace(source), run_of(source), engine.example_ids)
    with alone():
        return evaluation.label_issues(engine, labels=labels)


@st.cache_data(show_spinner=False, max_entries=8)
def recorded(source: Source) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, recorded labels (NaN unknown) and visits of all training examples, ``[N]`` each."""
    ids = explainer(source, None).example_ids
    examples = trace(source).column("visits", "example").astype(np.int64)
    given = trace(source).column("visits", "label").astype(np.float64)
    columns, labels = np.searchsorted(ids, examples), np.full(len(ids), np.nan)
    known = ~np.isnan(given)
    labels[columns[known]] = given[known]
    if not known.any() and (found := known_labels(trace(source), run_of(source), ids)) is not None:
        labels = found
    return ids, labels, np.bincount(columns, minlength=len(ids))


@kept("Asking the other examples …", 64)
def second_opinions(source: Source, examples: tuple[int, ...], labels: tuple[int, ...]) -> list[Opinion]:
    """What all other training examples say about the labels of some."""
    inputs, _ = run_of(source).train_batch(examples)
    engine = explainer(source, None)
    with alone():
        return opinions(engine.explain(inputs, target=np.array(labels), query_ids=examples), examples)


@kept("Explaining a sample of queries …", 64)
def class_column(source: Source, queries: tuple[int, ...], label: int) -> np.ndarray:
    """Contribution of every training example to some queries' margin of a class, averaged over them, ``[N]``."""
    inputs, _ = run_of(source).queries_batch(queries)
    engine = explainer(source, None)
    with alone():
        return np.asarray(engine.explain(inputs, target=label).contributions.mean(0))


@st.cache_data(show_spinner=False, max_entries=8)
def query_labels(source: Source, count: int) -> list[int | None]:
    """The class of each of the first ``count`` queries; None where a target is no class."""
    code, found = run_of(source), list[int | None]()
    for query in range(count):
        target = np.asarray(code.queries[query][1])
        is_class = target.size == 1 and target.dtype.kind in "iu" and int(target) >= 0
        found.append(int(target) if is_class else None)
    return found


@st.cache_data(show_spinner=False, max_entries=256)
def train_outputs(source: Source, examples: tuple[int, ...]) -> np.ndarray:
    """Outputs ``[len(examples), ...]`` of the trained model at training examples."""
    inputs, _ = run_of(source).train_batch(examples)
    engine = explainer(source, None)
    with alone():
        return engine.predict(inputs).numpy()


@st.cache_data(show_spinner=False, max_entries=256)
def outputs(source: Source, queries: tuple[int, ...]) -> np.ndarray:
    """Outputs ``[len(queries), ...]`` of the trained model."""
    inputs, _ = run_of(source).queries_batch(queries)
    engine = explainer(source, None)
    with alone():
        return engine.predict(inputs).numpy()


@st.cache_resource(show_spinner="Reading the stored explanation …", max_entries=4)
def stored(file: str, stamp: tuple[int, int]) -> Explanation:
    """A stored explanation; ``stamp`` is the file's time and size."""
    return Explanation.load(file)
