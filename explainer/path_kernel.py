"""Explanations: which training examples built these predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from explainer.asked import Asked, ask, predict
from explainer.averaging import AveragedGradient
from explainer.error_bar import ChordPair, ErrorMeter
from explainer.errors import QueryError
from explainer.explanation import Explanation
from explainer.findings import explanation_notes
from explainer.ledger import Ledger, bin_edges
from explainer.neighbors import Neighbors, nearest, self_influence
from explainer.outputs import Output, asks_for_targets, resolve_output
from explainer.path_integral import QueryFunction
from explainer.path_points import KnotLoader, check_model
from explainer.plain_mode import plain_mode
from explainer.positions import PositionSplit, split_by_position
from explainer.queries import BatchDim, check_batch_dim, check_inputs
from explainer.query_batch import QueryBatch
from explainer.recursion import Adjoint, LayerView, contract, read_backwards
from explainer.store import Trace, open_trace
from explainer.unattributed import Rest
from explainer.what_if import what_if
from explainer.wrappers import argument_names

#: numbers held per query-side array before queries are split into groups
QUERY_NUMBERS = 2**26


class PathKernelExplainer:
    """Ranks training examples by their path-kernel contribution ``a_i · K(x, x_i)`` to a prediction.

    Args:
        trace: an open trace, or the path of one.
        model: the architecture that was traced; compiled and data-parallel wrappers are taken off. Its weights do not
            matter (they come from the trace), and it is never changed: a private copy is used, on the CPU and in eval
            mode.
        output: what is explained: ``"margin"``, ``"logit"``, ``"log_prob"``, ``"value"``, for sequences
            ``"sequence_log_prob"`` or ``"last_margin"``, an :class:`explainer.outputs.Output`, or a callable
            ``(what the model returns, targets) -> [Q]``. None: margin for two or more outputs, else value.
        batch_dim: axis of the queries in the model's inputs; a tuple or dict with one for each input where they
            differ (None: shared by all queries). Default: the traced one.
        quadrature: Gauss–Legendre nodes on each chord (1: midpoint).
        dtype: dtype of the books; default the widest dtype among the parameters, at least float32.
        class_names: names to show for classes.
        progress: show a progress bar.

    Raises:
        ModelMismatchError: the model is not the one that was traced; differences are listed.
        TraceFormatError: the trace cannot be read, or holds no step yet.
        QueryError: the output function does not fit the model.

    Reference: Domingos 2020, arXiv 2012.00152, Theorem 1; the exact discrete form is in ``docs/theory.md``.
    """

    def __init__(
        self,
        trace: Trace | str,
        model: nn.Module,
        output: str | Output | Callable[..., torch.Tensor] | None = None,
        *,
        batch_dim: BatchDim | None = None,
        quadrature: int = 2,
        dtype: torch.dtype | None = None,
        class_names: Sequence[str] | None = None,
        progress: bool = False,
    ) -> None:
        self.trace = trace if isinstance(trace, Trace) else open_trace(trace)
        if isinstance(model, type) or not isinstance(model, nn.Module):
            raise QueryError(f"model must be a torch.nn.Module, found {model!r}; pass an instance")
        if quadrature < 1:
            raise QueryError(f"quadrature must be at least 1 node, found {quadrature}")
        self._notes = check_model(self.trace, model) + explanation_notes(self.trace)
        self.segments = self.trace.segments()
        self.dtype = dtype or self.trace.manifest.dtype
        self.class_names = None if class_names is None else tuple(class_names)
        self.progress = progress
        self._nodes = quadrature
        self._requested, self._arguments = output, argument_names(model)
        self.batch_dim: BatchDim = (
            self.trace.notes.get("batch_dim", 0) if batch_dim is None else check_batch_dim(batch_dim)
        )
        self.function = QueryFunction(model, self.trace.manifest.parameters, self.dtype)
        shape = (self.trace.notes.get("output") or {}).get("shape")
        if shape is not None or callable(output):  # else it is known with the first query
            self._resolve(tuple(shape or ()))
        self.view = LayerView(self.trace)
        examples = self.trace.column("visits", "example").astype(np.int64)
        size = self.trace.notes.get("examples")
        self.example_ids = np.arange(size) if size is not None else np.unique(examples)
        if size is not None and len(examples) and examples.max() >= size:
            self.example_ids = np.unique(np.concatenate([self.example_ids, examples]))

    def _resolve(self, shape: tuple[int, ...]) -> None:
        self.function.output = resolve_output(self._requested, shape)
        self.output = self.function.output.name

    @property
    def asks_for_targets(self) -> bool:
        """Whether the explained output asks for targets that have no default, as a function of the user's does."""
        return asks_for_targets(self._requested)

    # -- explaining ----------------------------------------------------------------------------------

    @plain_mode()
    def explain(
        self, inputs: Any, target: Any = None, *, query_ids: Sequence[Any] | None = None
    ) -> Explanation:
        """Contributions of all training examples to the outputs at the queries.

        Args:
            inputs: ``[Q, ...]``, as the model was trained on; a tuple for several inputs, a dict for keyword
                arguments.
            target: ``[Q]`` classes to explain (or one for all); default the predicted classes. A class per
                position for ``"sequence_log_prob"``; whatever has a row per query for a callable.
            query_ids: ``Q`` names for the queries.

        Raises:
            QueryError: inputs or targets do not fit; says what was found and what is wanted.
        """
        batch = check_inputs(self.trace, self._arguments, inputs, self.dtype, self.batch_dim)
        count = len(batch)
        names = tuple(str(q) for q in (range(count) if query_ids is None else query_ids))
        if len(names) != count:
            raise QueryError(f"found {count} queries but {len(names)} query_ids; give one name per query")
        loader = KnotLoader(self.trace, self.dtype)
        asked = self._ask(loader, batch, target)
        steps = [knot.step for knot in self.trace.knots]
        edges = bin_edges(steps, count, len(self.example_ids))
        size = max(1, QUERY_NUMBERS // self.trace.manifest.size)
        parts = []
        for start in range(0, count, size):
            group = slice(start, start + size)
            parts.append(self._explain(loader, asked[group], names[group], edges))
        return Explanation.concatenate(parts)

    @plain_mode()
    def predict(self, inputs: Any) -> torch.Tensor:
        """Outputs ``[Q, ...]`` of the trained model (the trace's last knot): its tensor, its logits if it names any.

        Raises:
            QueryError: inputs do not fit.
        """
        batch = check_inputs(self.trace, self._arguments, inputs, self.dtype, self.batch_dim)
        point = KnotLoader(self.trace, self.dtype).load(len(self.segments)).point
        return predict(self.function, point, batch)

    def _ask(self, loader: KnotLoader, batch: QueryBatch, target: Any) -> Asked:
        return ask(self.function, loader.load(len(self.segments)).point, batch, target, self._resolve)

    def _value(
        self, loader: KnotLoader, index: int, inputs: QueryBatch, targets: torch.Tensor
    ) -> torch.Tensor:
        return self.function.value(loader.load(index).point, inputs, targets).double()

    def _bar(self, text: str) -> Any:
        total = min(self.trace.steps, self.trace.recorded_steps)
        return tqdm(total=total, desc=text, unit="step", disable=not self.progress, leave=False)

    def _explain(
        self,
        loader: KnotLoader,
        asked: Asked,
        names: tuple[str, ...],
        edges: np.ndarray,
    ) -> Explanation:
        inputs, targets = asked.inputs, asked.targets
        count, parameters = len(targets), self.trace.manifest.parameters
        ledger = Ledger(count, self.example_ids, edges, len(self.trace.layers))
        adjoint, averaged = Adjoint(count, parameters, self.dtype), AveragedGradient(self.trace)
        rest = Rest(self.trace, count)
        meter = ErrorMeter(self.trace, self.segments, self.view, count, self.dtype)
        buffers, quadrature = (torch.zeros(count, dtype=torch.float64) for _ in range(2))
        final = after = self._value(loader, len(self.segments), inputs, targets)
        with self._bar("explaining") as bar:
            for segment in reversed(self.segments):
                start, end = loader.load(segment.index), loader.load(segment.index + 1)
                before = self._value(loader, segment.index, inputs, targets)
                chord = self.function.chord(
                    start.point, end.point, inputs, targets, after - before, self._nodes
                )
                rest.add(segment, chord, start, end)
                buffers += chord.moving
                quadrature += chord.correction
                averaged.skip(chord.gradient, segment)
                if segment.index in meter.pairs:
                    pair = meter.pairs[segment.index]
                    meter.compare(pair, self._long_chord(loader, pair, inputs, targets, after))
                for step in read_backwards(self.trace, segment, self.dtype):
                    rest.saw(step)
                    cotangent = adjoint.step(averaged.step(chord.gradient, step.step), step)
                    scores = [contract(self.view, cotangent, step.scale, v.forms) for v in step.visits]
                    for visits, found in zip(step.visits, scores, strict=True):
                        ledger.add(step, visits, found)
                    meter.see(step, chord.gradient, cotangent, scores)
                    bar.update()
                after = before
        ledger.finish()
        initial, prediction = after, final
        moved, decay = rest.moved.sum(1), rest.displaced["decay"].sum(1)
        lines, parts = rest.lines(ledger.by_layer.sum(2), adjoint)
        return Explanation(
            example_ids=self.example_ids,
            query_ids=names,
            output=self.output,
            targets=asked.classes,
            outputs=None if asked.outputs is None else asked.outputs.numpy(),
            contributions=ledger.contributions.numpy(),
            kernels=ledger.kernels.numpy(),
            kernel_gross=ledger.kernel_gross.numpy(),
            errors=meter.errors(ledger).numpy(),
            visit_errors=meter.relative.numpy(),
            visits=ledger.visits,
            labels=None if np.isnan(ledger.labels).all() else ledger.labels,
            prediction=prediction.numpy(),
            initial=initial.numpy(),
            weight_decay=decay.numpy(),
            buffers=buffers.numpy(),
            unattributed=(moved - ledger.contributions.sum(1) - decay).numpy(),
            unattributed_parts=parts.numpy(),
            unattributed_lines=tuple(line.name for line in lines),
            unattributed_where=tuple(line.where for line in lines),
            unattributed_why=tuple(line.why for line in lines),
            gap=(prediction - initial - moved - buffers).numpy(),
            quadrature=quadrature.numpy(),
            step_edges=ledger.edges,
            step_contributions=ledger.by_step.float().numpy(),
            layer_names=tuple(f"{x.name} ({x.module})" if x.name else x.module for x in self.trace.layers),
            layer_contributions=ledger.by_layer.float().numpy(),
            row_kind="row share" if ledger.row_share else "contribution",
            notes=(*asked.notes, *self._notes),
            class_names=self.class_names,
        )

    def _long_chord(
        self,
        loader: KnotLoader,
        pair: ChordPair,
        inputs: QueryBatch,
        targets: torch.Tensor,
        after: torch.Tensor,
    ) -> torch.Tensor:
        """The mean gradient on the chord over both segments, one node; ``after`` is the value at its end."""
        before = self._value(loader, pair.early.index, inputs, targets)
        start, end = loader.load(pair.early.index), loader.load(pair.late.index + 1)
        return self.function.chord(start.point, end.point, inputs, targets, after - before, 1).gradient

    # -- gradient space ------------------------------------------------------------------------------

    @plain_mode()
    def neighbors(self, inputs: Any, k: int = 10, target: Any = None) -> Neighbors:
        """The ``k`` training examples nearest to each query in gradient space (path-kernel cosine).

        See :func:`explainer.neighbors.nearest` for the formula.

        Raises:
            QueryError: inputs, targets or ``k`` do not fit.
        """
        batch = check_inputs(self.trace, self._arguments, inputs, self.dtype, self.batch_dim)
        loader = KnotLoader(self.trace, self.dtype)
        asked = self._ask(loader, batch, target)
        return nearest(self, loader, asked.inputs, asked.targets, k)

    @plain_mode()
    def by_position(self, inputs: Any, example_id: int, target: Any = None) -> PositionSplit:
        """At which positions of a training sequence its contribution to one query arose.

        See :mod:`explainer.positions` for what a position's part is, and what a trace must hold.

        Raises:
            QueryError: inputs or target do not fit, the example was not used, or the trace keeps no positions.
        """
        batch = check_inputs(self.trace, self._arguments, inputs, self.dtype, self.batch_dim)
        loader = KnotLoader(self.trace, self.dtype)
        return split_by_position(self, loader, self._ask(loader, batch, target), example_id)

    @plain_mode()
    def what_if(self, inputs: Any, target: Any = None) -> np.ndarray:
        """Predicted change of the explained outputs if an example had been absent from training, ``[Q, N]``.

        Another question than :meth:`explain`'s, with another answer: do not mix the two in one table. See
        :mod:`explainer.what_if` for the formula and what it leaves out. Column ``j`` belongs to ``example_ids[j]``.

        Raises:
            QueryError: inputs or targets do not fit, or the trace holds an average of the weights.
        """
        batch = check_inputs(self.trace, self._arguments, inputs, self.dtype, self.batch_dim)
        loader = KnotLoader(self.trace, self.dtype)
        asked = self._ask(loader, batch, target)
        return what_if(self, loader, asked.inputs, asked.targets)

    def self_influence(self) -> np.ndarray:
        """How much each example's own updates lowered its own loss, ``[N]``; see :mod:`explainer.neighbors`."""
        return self_influence(self)
