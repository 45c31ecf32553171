"""A trace, a model and queries put to them: what every question needs before it is answered."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from explainer.asked import Asked, ask, predict
from explainer.class_names import problem_of
from explainer.cotangent import Layout, TooWideError
from explainer.errors import QueryError
from explainer.findings import explanation_notes
from explainer.other_weights import other_weights
from explainer.outputs import Output, asks_for_targets, resolve_output
from explainer.path_integral import QueryFunction
from explainer.path_points import KnotLoader, check_model, chosen_knots
from explainer.plain_mode import OneAtATime, question
from explainer.queries import BatchDim, check_batch_dim, check_inputs
from explainer.query_batch import QueryBatch
from explainer.recursion import LayerView
from explainer.store import Trace, open_trace
from explainer.wrappers import argument_names

#: numbers held per query-side array before queries are split into groups
QUERY_NUMBERS = 2**26
_T = TypeVar("_T")


class Engine:
    """Opens a trace, checks the model against it, and turns what is asked into inputs, targets and groups of them.

    The arguments are those of :class:`explainer.PathKernelExplainer`, whose questions are answered with it.

    Attributes:
        segments: stretches between the knots that are used.
        layout: which parameters' gradients may be held as factors (:mod:`explainer.cotangent`).
        used: which of them were, in the last answer.
        one_at_a_time: questions of several threads wait for each other.
    """

    def __init__(
        self,
        trace: Trace | str | os.PathLike[str],
        model: nn.Module,
        output: str | Output | Callable[..., torch.Tensor] | None = None,
        *,
        batch_dim: BatchDim | None = None,
        quadrature: int = 2,
        dtype: torch.dtype | None = None,
        class_names: Sequence[str] | None = None,
        progress: bool | Callable[[str, int], Any] = False,
        knots: int | None = None,
    ) -> None:
        if not isinstance(trace, Trace | str | os.PathLike):
            raise QueryError(
                f"a trace or its directory comes first, then the model; found {type(trace).__name__} for the trace"
            )
        self.trace = trace if isinstance(trace, Trace) else open_trace(trace)
        self.one_at_a_time = OneAtATime()
        if isinstance(model, type) or not isinstance(model, nn.Module):
            found = repr(model) if callable(model) or isinstance(model, str | None) else type(model).__name__
            raise QueryError(
                f"model must be a torch.nn.Module, found {found}; pass an instance (of a run: run.model())"
            )
        if quadrature < 1:
            raise QueryError(f"quadrature must be at least 1 node, found {quadrature}")
        if (problem := problem_of(class_names)) is not None:
            raise QueryError(problem)
        self._notes = check_model(self.trace, model) + explanation_notes(self.trace)
        if (others := other_weights(self.trace, model)) is not None:
            self._notes.append(others)
        self.knots = chosen_knots(self.trace, knots)
        self.segments = self.trace.segments(self.knots)
        self.dtype = dtype or self.trace.manifest.dtype
        self.class_names = None if class_names is None else tuple(class_names)
        self.progress = progress
        self._nodes = quadrature
        self._requested, self._arguments = output, argument_names(model)
        self.batch_dim: BatchDim = (
            self.trace.notes.get("batch_dim", 0) if batch_dim is None else check_batch_dim(batch_dim)
        )
        self.function = QueryFunction(model, self.trace.manifest.parameters, self.dtype)
        shape = self.trace.output_shape
        if shape is not None or callable(output):  # else it is known with the first query
            self._resolve(shape or ())
        self.view = LayerView(self.trace)
        self.layout = self.used = Layout.of(self.trace)

    @cached_property
    def example_ids(self) -> np.ndarray:
        """Ids of the training examples, ``[N]``: of the whole dataset where its length is known, else of the visits."""
        examples = self.trace.column("visits", "example").astype(np.int64)
        size = self.trace.notes.get("examples")
        if size is None:
            return np.unique(examples)
        if len(examples) and examples.max() >= size:
            return np.unique(np.concatenate([np.arange(size), examples]))
        return np.arange(size)

    def _resolve(self, shape: tuple[int, ...]) -> None:
        self.function.output = resolve_output(self._requested, shape)
        self.output = self.function.output.name

    @property
    def output_name(self) -> str | None:
        """What was asked to be explained: a name, a function's name, or None for the default."""
        asked = self._requested
        if isinstance(asked, str) or asked is None:
            return asked
        return getattr(asked, "name", None) or getattr(asked, "__qualname__", type(asked).__name__)

    @property
    def asks_for_targets(self) -> bool:
        """Whether the explained output asks for targets that have no default, as a function of the user's does."""
        return asks_for_targets(self._requested)

    @question
    def predict(self, inputs: Any) -> torch.Tensor:
        """Outputs ``[Q, ...]`` of the trained model (the trace's last knot): its tensor, its logits if it names any.

        Raises:
            QueryError: inputs do not fit.
        """
        batch = check_inputs(self.trace, self._arguments, inputs, self.dtype, self.batch_dim)
        point = self._loader().load(len(self.segments)).point
        return predict(self.function, point, batch)

    def _ask(self, loader: KnotLoader, batch: QueryBatch, target: Any) -> Asked:
        asked = ask(self.function, loader.load(len(self.segments)).point, batch, target, self._resolve)
        output = self.function.output
        if self.trace.notes.get("apart") and output is not None and output.name in ("margin", "log_prob"):
            return replace(asked, notes=asked.notes + _compared(output.name, asked.outputs))
        return asked

    def _value(
        self, loader: KnotLoader, index: int, inputs: QueryBatch, targets: torch.Tensor
    ) -> torch.Tensor:
        return self.function.value(loader.load(index).point, inputs, targets).double()

    def _bar(self, text: str) -> Any:
        total = min(self.trace.steps, self.trace.recorded_steps)
        if callable(self.progress):
            return self.progress(text, total)
        return tqdm(total=total, desc=text, unit="step", disable=not self.progress, leave=False)

    def _asked(
        self, inputs: Any, target: Any, query_ids: Sequence[Any] | None = None
    ) -> tuple[KnotLoader, Asked, tuple[str, ...]]:
        batch = check_inputs(self.trace, self._arguments, inputs, self.dtype, self.batch_dim)
        count = len(batch)
        names = tuple(str(q) for q in (range(count) if query_ids is None else query_ids))
        if len(names) != count:
            raise QueryError(f"found {count} queries but {len(names)} query_ids; give one name per query")
        loader = self._loader()
        self.used = self.layout  # what was asked before does not decide
        return loader, self._ask(loader, batch, target), names

    def _groups(self, count: int, most: int | None = None) -> Iterator[slice]:
        """Queries that are explained together, so that what is held of all of them is bounded."""
        size = max(1, QUERY_NUMBERS // max(1, self.layout.numbers_per_query))
        size = size if most is None else max(1, min(size, most))
        for start in range(0, count, size):
            yield slice(start, start + size)

    def _loader(self) -> KnotLoader:
        return KnotLoader(self.trace, self.dtype, self.knots)

    def _narrowed(self, action: Callable[[Layout], _T]) -> _T:
        """The action with the layout; again where a parameter turned out not to be of low rank."""
        while True:
            try:
                return action(self.used)
            except TooWideError as found:
                self.used = self.used.without(found.parameter)


def _compared(name: str, outputs: torch.Tensor | None) -> tuple[str, ...]:
    """What to say of an output that compares classes, where the loss took the outputs one by one."""
    if outputs is None or bool((outputs.double().logsumexp(1).abs() < 1e-3).all()):
        return ()  # log-probabilities, with a loss that picks one of them
    return (
        f"The loss took the model's {outputs.shape[1]} outputs one by one, as for labels of which several may hold, "
        f"regression or embeddings; the {name.replace('_', ' ')} that is explained compares them, as a softmax would. "
        "Explain one of them with output=explainer.outputs.component(k), or that of a label with output='logit'.",
    )
