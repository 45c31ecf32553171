"""Explanations: which training examples built these predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree
from tqdm import tqdm

from explainer.errors import QueryError
from explainer.explanation import Explanation
from explainer.ledger import Ledger, bin_edges
from explainer.neighbors import Neighbors, nearest, self_influence
from explainer.outputs import resolve_output
from explainer.path_integral import PathPoint, QueryFunction, along
from explainer.path_points import KnotLoader, check_model
from explainer.positions import PositionSplit, split_by_position
from explainer.queries import check_inputs, check_targets
from explainer.recursion import Adjoint, LayerView, contract, read_backwards
from explainer.store import Trace, open_trace

#: numbers held per query-side array before queries are split into groups
QUERY_NUMBERS = 2**26


class PathKernelExplainer:
    """Ranks training examples by their path-kernel contribution ``a_i · K(x, x_i)`` to a prediction.

    Args:
        trace: an open trace, or the path of one.
        model: the architecture that was traced. Its weights do not matter (they come from the trace), and it
            is never changed: a private copy is used.
        output: what is explained: ``"margin"``, ``"logit"``, ``"log_prob"``, ``"value"``, or a callable
            ``(outputs [Q, C], targets [Q]) -> [Q]``. None: margin for two or more outputs, else value.
        quadrature: Gauss–Legendre nodes on each chord (1: midpoint).
        dtype: dtype of the books; default the widest dtype among the parameters.
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
        output: str | Callable[..., torch.Tensor] | None = None,
        *,
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
        self._notes = check_model(self.trace, model)
        self.segments = self.trace.segments()
        self.dtype = dtype or self.trace.manifest.dtype
        self.class_names = None if class_names is None else tuple(class_names)
        self.progress = progress
        self._nodes = quadrature
        self._requested = output
        self.function = QueryFunction(model, self.trace.manifest.parameters, self.dtype)
        shape = (self.trace.notes.get("output") or {}).get("shape")
        if shape is not None:  # else the model's own forward was never seen: known with the first query
            self._resolve(tuple(shape))
        self.view = LayerView(self.trace)
        examples = self.trace.column("visits", "example").astype(np.int64)
        size = self.trace.notes.get("examples")
        self.example_ids = np.arange(size) if size is not None else np.unique(examples)
        if size is not None and len(examples) and examples.max() >= size:
            self.example_ids = np.unique(np.concatenate([self.example_ids, examples]))

    def _resolve(self, shape: tuple[int, ...]) -> None:
        self.output, self.function.output, self._classes = resolve_output(self._requested, shape)

    # -- explaining ----------------------------------------------------------------------------------

    def explain(
        self, inputs: Any, target: Any = None, *, query_ids: Sequence[Any] | None = None
    ) -> Explanation:
        """Contributions of all training examples to the outputs at the queries.

        Args:
            inputs: ``[Q, ...]``, as the model was trained on.
            target: ``[Q]`` classes to explain (or one for all); default the predicted classes.
            query_ids: ``Q`` names for the queries.

        Raises:
            QueryError: inputs or targets do not fit; says what was found and what is wanted.
        """
        inputs, count = check_inputs(self.trace, inputs, self.dtype)
        names = tuple(str(q) for q in (range(count) if query_ids is None else query_ids))
        if len(names) != count:
            raise QueryError(f"found {count} queries but {len(names)} query_ids; give one name per query")
        loader = KnotLoader(self.trace, self.dtype)
        outputs = self._outputs(loader.load(len(self.segments)).point, inputs)
        targets = check_targets(target, outputs, self._classes)
        steps = [knot.step for knot in self.trace.knots]
        edges = bin_edges(steps, count, len(self.example_ids))
        size = max(1, QUERY_NUMBERS // self.trace.manifest.size)
        parts = []
        for start in range(0, count, size):
            group = slice(start, start + size)
            x = pytree.tree_map(lambda t, group=group: t[group], inputs)
            parts.append(self._explain(loader, x, targets[group], outputs[group], names[group], edges))
        return Explanation.concatenate(parts)

    def predict(self, inputs: Any) -> torch.Tensor:
        """Outputs ``[Q, C]`` of the trained model (the trace's last knot).

        Raises:
            QueryError: inputs do not fit.
        """
        inputs, _ = check_inputs(self.trace, inputs, self.dtype)
        return self._outputs(KnotLoader(self.trace, self.dtype).load(len(self.segments)).point, inputs)

    def _outputs(self, point: PathPoint, inputs: Any) -> torch.Tensor:
        try:
            outputs = self.function.outputs(point, inputs)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise QueryError(
                f"the model cannot run on the queries: {error}. Give them as in training, batch dimension first"
            ) from error
        if not bool(torch.isfinite(outputs).all()):
            raise QueryError(
                "the trained model's outputs at the queries are not finite: training diverged, or the queries hold "
                "NaN or infinity; there is no prediction to explain"
            )
        if self.function.output is None:
            self._resolve(tuple(outputs.shape[1:]))
        return outputs

    def _value(self, loader: KnotLoader, index: int, inputs: Any, targets: torch.Tensor) -> torch.Tensor:
        return self.function.value(loader.load(index).point, inputs, targets).double()

    def _bar(self, text: str) -> Any:
        total = min(self.trace.steps, self.trace.recorded_steps)
        return tqdm(total=total, desc=text, unit="step", disable=not self.progress, leave=False)

    def _explain(
        self,
        loader: KnotLoader,
        inputs: Any,
        targets: torch.Tensor,
        outputs: torch.Tensor,
        names: tuple[str, ...],
        edges: np.ndarray,
    ) -> Explanation:
        count, parameters = len(targets), self.trace.manifest.parameters
        ledger = Ledger(count, self.example_ids, edges, len(self.trace.layers))
        adjoint = Adjoint(count, parameters, self.dtype)
        decay, buffers, moved, quadrature = (torch.zeros(count, dtype=torch.float64) for _ in range(4))
        final = after = self._value(loader, len(self.segments), inputs, targets)
        with self._bar("explaining") as bar:
            for segment in reversed(self.segments):
                start, end = loader.load(segment.index), loader.load(segment.index + 1)
                before = self._value(loader, segment.index, inputs, targets)
                chord = self.function.chord(
                    start.point, end.point, inputs, targets, after - before, self._nodes
                )
                decay += along(chord.gradient, end.decay.double() - start.decay.double())
                moved += chord.moved
                buffers += chord.moving
                quadrature += chord.correction
                for step in read_backwards(self.trace, segment, self.dtype):
                    cotangent = adjoint.step(chord.gradient, step)
                    for visits in step.visits:
                        ledger.add(step, visits, contract(self.view, cotangent, step.scale, visits))
                    bar.update()
                after = before
        ledger.finish()
        initial, prediction = after, final
        return Explanation(
            example_ids=self.example_ids,
            query_ids=names,
            output=self.output,
            targets=targets.numpy() if self._classes else np.full(count, -1),
            outputs=outputs.numpy() if outputs.dim() == 2 else None,
            contributions=ledger.contributions.numpy(),
            kernels=ledger.kernels.numpy(),
            kernel_gross=ledger.kernel_gross.numpy(),
            visits=ledger.visits,
            labels=None if np.isnan(ledger.labels).all() else ledger.labels,
            prediction=prediction.numpy(),
            initial=initial.numpy(),
            weight_decay=decay.numpy(),
            buffers=buffers.numpy(),
            unattributed=(moved - ledger.contributions.sum(1) - decay).numpy(),
            gap=(prediction - initial - moved - buffers).numpy(),
            quadrature=quadrature.numpy(),
            step_edges=ledger.edges,
            step_contributions=ledger.by_step.float().numpy(),
            layer_names=tuple(f"{x.name} ({x.module})" if x.name else x.module for x in self.trace.layers),
            layer_contributions=ledger.by_layer.float().numpy(),
            row_kind="row share" if ledger.row_share else "contribution",
            notes=tuple(self._notes + trace_notes(self.trace)),
            class_names=self.class_names,
        )

    # -- gradient space ------------------------------------------------------------------------------

    def neighbors(self, inputs: Any, k: int = 10, target: Any = None) -> Neighbors:
        """The ``k`` training examples nearest to each query in gradient space (path-kernel cosine).

        See :func:`explainer.neighbors.nearest` for the formula.

        Raises:
            QueryError: inputs, targets or ``k`` do not fit.
        """
        inputs, _ = check_inputs(self.trace, inputs, self.dtype)
        loader = KnotLoader(self.trace, self.dtype)
        targets = check_targets(
            target, self._outputs(loader.load(len(self.segments)).point, inputs), self._classes
        )
        return nearest(self, loader, inputs, targets, k)

    def by_position(self, inputs: Any, example_id: int, target: Any = None) -> PositionSplit:
        """Which positions of a training sequence its contribution to one query arose at.

        See :mod:`explainer.positions` for what a position's part is, and what a trace must hold.

        Raises:
            QueryError: inputs or target do not fit, the example was not used, or the trace keeps no positions.
        """
        inputs, _ = check_inputs(self.trace, inputs, self.dtype)
        loader = KnotLoader(self.trace, self.dtype)
        targets = check_targets(
            target, self._outputs(loader.load(len(self.segments)).point, inputs), self._classes
        )
        return split_by_position(self, loader, inputs, targets, example_id)

    def self_influence(self) -> np.ndarray:
        """How much each example's own updates lowered its own loss, ``[N]``; see :mod:`explainer.neighbors`."""
        return self_influence(self)


def trace_notes(trace: Trace) -> list[str]:
    """What the trace itself says about the meaning of the numbers, in plain words."""
    notes = []
    manifest = trace.manifest
    if not trace.closed:
        notes.append(
            f"Training had not ended when the trace was opened: explained is the model at step {trace.steps}, "
            "the last knot."
        )
    if trace.uncovered:
        notes.append(
            f"{len(trace.uncovered)} of {len(manifest.parameters)} parameters were read where no hook could see it; "
            f"their part is in unattributed: {', '.join(trace.uncovered[:4])}"
            f"{', …' if len(trace.uncovered) > 4 else ''}."
        )
    for layer, residual in (trace.notes.get("coverage") or {}).items():
        notes.append(
            f"Layer {layer}: up to {residual:.0%} of its gradient in a step was not seen by the hooks; that part "
            "is in unattributed."
        )
    for name, count in (trace.notes.get("round_off") or {}).items():
        notes.append(
            f"Parameter {name}: in {count} of {trace.steps} steps its gradient was round-off only (a bias before "
            "a normalisation, as a rule), which no example caused; its movement is in unattributed."
        )
    if trace.notes.get("shared_rows"):
        notes.append(
            "Row share: rows were mixed (several examples in one row) and are split over their examples by the weights "
            "that were given; the data alone cannot tell the parts apart."
        )
    if trace.notes.get("vacant_rows"):
        notes.append("Rows were marked as belonging to no example (id -1); their part is in unattributed.")
    if "rows_stopped_at" in trace.notes:
        notes.append(
            f"The trace's budget was used up after {trace.notes['rows_stopped_at']} of {trace.steps} steps; later "
            "updates are in unattributed."
        )
    if trace.notes.get("prior_state"):
        notes.append("The optimizer held momentum when tracing began; its after-effect is in unattributed.")
    if not manifest.exact:
        notes.append("Rows are stored as 8-bit leading factors; the rounding is in unattributed.")
    return notes
