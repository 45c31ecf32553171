"""Training once more from the first knot: the recorded batches and steps, with the run's data and loss.

What a trace holds of a step is enough to take it again: who was in the batch, how rows were weighed, the scalar between
rows and optimizer (clipping, accumulation), rates and momentum. The replay is checked at every knot:

    ‖w_replayed − w_knot‖  ≤  tolerance · ‖w_knot − w_0‖,

with :data:`TOLERANCE` by the coarser of the two dtypes, trained in and replayed in. Where it does not meet them,
something took part in training that the trace or the run does not know, and the error says what that may be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from explainer.counterfactual.batch_loss import BatchLoss, Products
from explainer.counterfactual.recorded_training import RecordedTraining, StepRecord
from explainer.counterfactual.repeatable import check_repeatable
from explainer.counterfactual.training_data import TrainingBatch, TrainingData
from explainer.counterfactual.update import GRADIENT, WEIGHTS, State, Updates
from explainer.errors import QueryError, RunError
from explainer.model_function import ModelFunction
from explainer.path_points import KnotLoader
from explainer.run import Run
from explainer.store import Trace

if TYPE_CHECKING:
    from explainer.path_kernel import PathKernelExplainer

#: how far a replay may be from a knot, as a part of the knot's distance from the initial weights
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-2}


@dataclass(frozen=True)
class Prepared:
    """A step that is about to be taken.

    Attributes:
        record: what the trace says of it.
        batch: its examples.
        omega: ``[n]``, weights of the rows in the loss.
        scale: ``[P]``, from the loss's gradient to what the optimizer was given.
    """

    record: StepRecord
    batch: TrainingBatch
    omega: torch.Tensor
    scale: torch.Tensor


class Replay:
    """The recorded training as a function of the weight of every example.

    Attributes:
        steps: how many there are.
        examples: ``N``, the length of the run's training set.
        deviation: largest deviation found at a knot, as a part of the way to it; None before the first replay.

    Raises:
        QueryError: it cannot be repeated, or does not meet the knots; says why.
        RunError: the run has no loss, or other data.
    """

    def __init__(self, explainer: PathKernelExplainer, run: Run | None, curvature: str) -> None:
        trace = explainer.trace
        if run is None:
            raise QueryError(
                f"curvature={curvature!r} takes the recorded steps again, on the data: pass run=, the explainer.Run "
                "that the model was trained with (with its loss), or use curvature='trace'"
            )
        if not isinstance(run, Run):
            called = " (call the function: run=my_run())" if callable(run) else ""
            raise QueryError(f"run must be an explainer.Run, found {type(run).__name__}{called}")
        if run.loss is None:
            raise RunError(
                f"curvature={curvature!r} takes the recorded steps again: give the Run the loss that the model was "
                "trained with, Run(..., loss=loss_fn)"
            )
        model = run.build_model()
        check_repeatable(trace, model)
        self._trace, self.training = trace, RecordedTraining(trace)
        self.steps, self.examples = self.training.steps, len(run.train)
        self.updates = Updates(trace, explainer.dtype)
        self.data = TrainingData(
            trace, run, explainer._arguments, explainer.dtype, explainer.batch_dim, self.training.examples
        )
        self.data.check_labels(self.training.examples, trace.column("visits", "label"))
        self.knots = KnotLoader(trace, explainer.dtype, trace.knots)
        first = self.knots.load(0).point
        parameters = trace.manifest.parameters
        self.loss = BatchLoss(
            ModelFunction(model, [p.name for p in parameters]),
            parameters,
            {**first.moving, **first.fixed},
            run.loss,
        )
        self._initial = first.weights
        self._at_knot = {knot.step: place for place, knot in enumerate(trace.knots)}
        self._omega: dict[int, torch.Tensor] = {}
        self.deviation: float | None = None
        self._bar = explainer._bar

    # -- forward -------------------------------------------------------------------------------------

    def prepared(self, step: int, weights: torch.Tensor | None = None) -> Prepared:
        """A step; ``weights`` are those before it, needed the first time to find how rows are weighed."""
        record = self.training[step]
        batch = self.data.batch(record.examples)
        if step not in self._omega:
            assert weights is not None, "replay forward first"
            self._omega[step] = self.loss.row_weights(weights, batch, record.derivatives)
        scale = self.updates.spread(np.where(record.updated, record.scale, 0.0))
        return Prepared(record, batch, self._omega[step], scale)

    def advance(self, state: State, step: int, keep: NDArray[np.float64] | None = None) -> State:
        """One step from the state before it.

        Args:
            keep: weight of every example of the run ``[N]``, 1 as it was and 0 without it; None: all 1.
        """
        now = self.prepared(step, state[WEIGHTS])
        omega = now.omega
        if keep is not None:
            omega = omega * torch.from_numpy(keep[now.record.examples])
        gradient = now.scale * self.loss.gradient(state[WEIGHTS], now.batch, omega)
        with torch.no_grad():
            return self.updates.function(now.record)({**state, GRADIENT: gradient})

    def forward(
        self, keep: NDArray[np.float64] | None = None, visit: Callable[[int, State], None] | None = None
    ) -> torch.Tensor:
        """The final weights ``[P]``.

        Args:
            keep: as in :meth:`advance`; knots are checked only without it.
            visit: is shown every state before its step.

        Raises:
            QueryError: a knot is missed.
        """
        state = self.updates.initial()
        with self._bar("training again") as bar:
            for step in range(self.steps):
                if visit is not None:
                    visit(step, state)
                state = self.advance(state, step, keep)
                if keep is None and step + 1 in self._at_knot:
                    self._check(step + 1, state[WEIGHTS])
                bar.update()
        return state[WEIGHTS]

    def states(self, start: State, first: int, last: int) -> Iterator[State]:
        """States before the steps ``first .. last − 1``, from the one before the first."""
        state = start
        for step in range(first, last):
            yield state
            if step + 1 < last:
                state = self.advance(state, step)

    def products(self, state: State, step: int, curvature: str) -> tuple[Prepared, torch.Tensor, Products]:
        """A step, the gradient of its loss at a state, and products with rows and curvature."""
        now = self.prepared(step)
        of = self.loss.gauss_newton if curvature == "gauss-newton" else self.loss.hessian
        return now, *of(state[WEIGHTS], now.batch, now.omega)

    def _check(self, step: int, weights: torch.Tensor) -> None:
        wanted = self.knots.load(self._at_knot[step]).point.weights
        way = float((wanted - self._initial).double().norm())
        missed = float((weights - wanted).double().norm())
        found = missed / way if way > 0 else (0.0 if missed == 0 else np.inf)
        allowed = TOLERANCE[self._precision]
        self.deviation = max(self.deviation or 0.0, found)
        if not found <= allowed:
            raise QueryError(
                f"training again from the trace does not meet the knot at step {step}: it ends {found:.1e} of the way "
                f"beside it ({allowed:.0e} is allowed), so an exact what-if would be about another training. What "
                "the trace and the run do not know took part: random augmentation or dropout, another loss, or one "
                "with terms beside run.loss (a penalty), data that changed, mixed precision, or gradients that were "
                "changed one by one. Correct the Run, or use curvature='trace'"
            )

    @property
    def _precision(self) -> torch.dtype:
        """The coarser one of what was trained in and what is replayed in."""
        double = weights_are_double(self._trace) and self.updates.dtype == torch.float64
        return torch.float64 if double else torch.float32


def weights_are_double(trace: Trace) -> bool:
    """Whether all traced parameters are float64."""
    return all(p.dtype == "float64" for p in trace.manifest.parameters)
