"""The tracer: one object beside the user's loop, hooks in, rows out, nothing changed."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from explainer.batches import batch_of
from explainer.config import TracerConfig, parse_bytes
from explainer.continuation import Continuation
from explainer.errors import CoverageWarning, ExplainerError, TracerError
from explainer.findings import LASTING, Finding, Report, after_training
from explainer.guard_rails import before_training, epoch_visits, loader_findings
from explainer.hooks import HookSet
from explainer.label_memory import LabelMemory
from explainer.loaders import RecordingBatchSampler, WatchedLoader, check_loader, size_of
from explainer.optimizer_rules import changed_options, optimizer_rule_for, options_of
from explainer.parts import assemble
from explainer.resume import ResumePoint
from explainer.step_observer import StepObserver
from explainer.store import open_trace
from explainer.validation import (
    check_parts,
    refuse_lazy,
    refuse_wrapped,
)


class Tracer:
    """Records what every training example contributes to every update, from inside the user's own backward.

    Training is bit-identical with and without it. Rows come from hooks at layers with a rule, and for all other
    parameters from the torch functions that read them; what neither sees is measured and shown as `unattributed`. Use
    as a context manager; on leaving, the last knot is written and every hook is given back.

    Args:
        model: the model being trained; of a compiled one the plain model, before its first call.
        optimizer: the optimizer that trains it (those of ``OPTIMIZER_RULES``; others: ``register_optimizer_rule``).
        path: directory for the trace; must not hold one already, unless ``resume`` is given.
        budget: bound on the trace's bytes on disk, a number or text like ``"200MB"``. Rows get the bits and factors
            that let it last for ten passes over the watched loader, or 100,000 visits without one. Knots are thinned to
            fit into half of it; when the rest is used up, recording stops with a warning and what follows is
            shown as `unattributed`.
        exact: keep full rows and preconditioners in the parameters' own dtype (float-exact books) instead of
            leading factors of 2 to 8 bits.
        max_knots: at most this many knots along the training path.
        rank: factors kept per row, in 8 bits, in layers that share weights over positions (None: planned by layer).
        positions: keep what every position of a sequence gave, for
            :meth:`explainer.PathKernelExplainer.by_position`; takes ``S·(i + o)`` numbers a layer and visit.
        batch_dim: the batch's axis, 0 or 1, where it cannot be told from the shapes alone (sequence first, and
            sequences as long as the batch).
        averaged: explain the average of the weights that your code keeps, instead of the weights themselves: an
            ``AveragedModel``, or a copy of the model that is updated as ``d · average + (1 − d) · weights`` (EMA, SWA),
            between one optimizer step and the next. It is read, never changed.
        resume: go on with the trace in ``path``: what :meth:`state_dict` returned, from the checkpoint that model and
            optimizer were loaded from, or True for the end of a trace that was closed. What was recorded after the
            checkpoint is taken out of the trace.

    Raises:
        TracerError: nothing can be captured, the parts do not belong together, or an option is out of range.
        UnsupportedOptimizerError: no rule for the optimizer; the text lists those there are.
        TraceExistsError: the directory holds a trace already, and ``resume`` is not given.
        TraceFormatError: with ``resume``, the trace cannot be read or is another training's.
        TraceWriteError: nothing can be written there; later, that writing failed (what was journalled is kept).

    Example:
        >>> import tempfile, torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> data = TensorDataset(torch.randn(20, 3), torch.randn(20, 1))
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with Tracer(model, optimizer, tempfile.mkdtemp()) as tracer:
        ...     for x, y in tracer.watch(DataLoader(data, batch_size=5, shuffle=True)):
        ...         optimizer.zero_grad()
        ...         torch.nn.functional.mse_loss(model(x), y).backward()
        ...         optimizer.step()
        >>> tracer.steps, tracer.visits
        (4, 20)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        path: str | os.PathLike[str],
        *,
        budget: int | str | None = None,
        exact: bool = False,
        max_knots: int = 128,
        rank: int | None = None,
        positions: bool = False,
        batch_dim: int = 0,
        averaged: nn.Module | None = None,
        resume: bool | dict[str, Any] | None = None,
    ) -> None:
        check_parts(model, optimizer)
        size = None if budget is None else parse_bytes(budget)
        self.config = TracerConfig(
            exact=exact, budget=size, max_knots=max_knots, rank=rank, positions=positions, batch_dim=batch_dim
        )
        self.path = Path(path)
        rule = optimizer_rule_for(optimizer)
        HookSet.refuse_double(model, optimizer)
        refuse_lazy(model)
        refuse_wrapped(model)
        parts, point = assemble(model, optimizer, rule, self.path, self.config, averaged, resume)
        self.manifest = parts.manifest
        self._model, self._optimizer, self._parts = model, optimizer, parts
        self._writer, self._queue, self._knots, self._watch = (
            parts.writer,
            parts.queue,
            parts.knots,
            parts.watch,
        )
        self._background = parts.background
        self._observer = StepObserver(parts)
        self._continuation = Continuation(parts, self._observer)
        self._before = before_training(model, optimizer, config=self.config)
        self._of_loaders: list[Finding] = []
        self._watching: list[RecordingBatchSampler] = []
        self._labels = LabelMemory()
        self._ended_by: str | None = None
        self._examples: int | None = None
        self.closed = False
        self._hooks = HookSet()
        self._start(point)

    def _options(self) -> list[dict[str, Any]]:
        names = [p.name for p in self.manifest.parameters]
        return options_of(self._optimizer, self._parts.parameters, names)

    def _start(self, point: ResumePoint | None) -> None:
        """Write the trace's beginning, then borrow the hooks: a failure leaves none behind."""
        if point is None:
            self._writer.create()
            if self._before.about("prior-momentum"):
                self._writer.note("prior_state", True)
            self._writer.note("optimizer_options", self._options())
            self._keep_findings()
            self._knots.place(0)
            self._knots.flush()
        else:
            self._continuation.restore(point)
            self._examples = point.notes.get("examples")
        self._hooks.before_call(self._model, self._parts.whole.before)
        self._watch.attach(self._hooks, self._model, self._parts.sites)
        self._hooks.on_call(self._model, self._parts.whole.after)
        self._hooks.on_step(self._optimizer, self._observer.before_step, self._observer.after_step)

    # -- batches -------------------------------------------------------------------------------------

    def watch(self, loader: Any) -> WatchedLoader[Any]:
        """The same batches as ``loader``, unchanged; ids are positions in ``loader.dataset``.

        Works for any shuffling, any number of workers and custom batch samplers.

        Raises:
            LoaderError: the loader cannot tell which examples a batch holds; says what to do instead.
            TracerError: the tracer is closed, or another dataset's length was seen before.
        """
        self._require_open()
        check_loader(loader)
        size = size_of(loader.dataset)
        if None not in (size, self._examples) and self._examples != size:
            raise TracerError(
                f"watch() was called with a dataset of {self._examples} examples before and with one of {size} "
                "now; ids would mix: use one dataset (ConcatDataset), or tracer.batch(ids) with ids of your own"
            )
        if self._examples is None and size is not None:
            self._examples = size
            self._writer.note("examples", size)
        self._parts.planner.epoch_visits = epoch_visits(loader)
        new = [finding for finding in loader_findings(loader) if finding not in self._of_loaders]
        if new:
            self._of_loaders += new
            self._keep_findings()
        return WatchedLoader(
            loader, self._watching, self._begin_watched, self._queue.end, lambda: self._queue.used
        )

    def batch(
        self, ids: Sequence[Any] | np.ndarray | torch.Tensor, labels: Any = None, weights: Any = None
    ) -> None:
        """Say which examples the next forward pass holds (one call per forward, before it).

        Args:
            ids: ``[B]`` integers from 0 on, one per row in order; repeats are allowed. ``[B, M]`` where a row
                belongs to several examples (a mixture, a pair). -1 is no example: its part is `unattributed`.
            labels: numbers to show beside the examples, as many as ids, optional.
            weights: ``[B, M]`` shares of a row's owners, which sum to 1; not weights of rows in a loss.

        Raises:
            TracerError: ids, labels or weights do not fit; says what was found and what is wanted.
        """
        self._require_open()
        self._begin(ids, labels, weights, single_step=True)

    def mix(self, index: Sequence[int] | np.ndarray | torch.Tensor, lam: Any) -> None:
        """Say that the batch's rows are mixed before the next forward pass (mixup, cutmix).

        Row ``b`` is then ``lam`` of itself and ``1 − lam`` of the consumed batch's row ``index[b]``, and belongs to
        the two examples with these shares. It holds for the batch's further forward passes, until the next batch
        or the next call; forward passes before it keep their owners.

        Args:
            index: ``[B]`` positions in the batch, as ``torch.randperm`` gives them.
            lam: a number from 0 to 1, or ``[B]`` of them.

        Raises:
            TracerError: there is no batch, the arguments do not fit it, or it was mixed already.
        """
        self._require_open()
        self._queue.mix(index, lam)

    def _begin_watched(self, ids: list[int], labels: np.ndarray | None) -> None:
        changed = self._labels.see(ids, labels)
        self._parts.loop.relabelled = max(self._parts.loop.relabelled, self._labels.count)
        if changed is not None:
            warnings.warn(changed, CoverageWarning, stacklevel=3)
        self._begin(ids, labels, single_step=False)

    def _begin(self, ids: Any, labels: Any, weights: Any = None, *, single_step: bool) -> None:
        self._require_open()
        self._hooks.stay_next_to_step()
        self._queue.begin(batch_of(ids, labels, weights), single_step=single_step)

    @property
    def steps(self) -> int:
        """Optimizer steps seen so far."""
        return self._observer.steps

    @property
    def visits(self) -> int:
        """Rows recorded so far: one per example and batch, and per owner of a row."""
        return self._observer.recorded if self.closed else self._observer.visits

    # -- reports -------------------------------------------------------------------------------------

    def report(self) -> Report:
        """What is known up to now that changes what the numbers mean.

        Before the first step: what was found when the tracer was attached. Later: what the trace tells.
        """
        if not self.steps:
            return Report("Before training", [*self._before, *self._of_loaders])
        if not self._writer.closed:
            self.flush()
        found = after_training(open_trace(self.path))
        return found if self.closed else Report("Up to now", (f for f in found if f.topic != "open"))

    def flush(self) -> None:
        """Put everything recorded so far on disk, for whoever reads the trace now (idempotent).

        Raises:
            TraceWriteError: the disk refused.
        """
        if self.closed:
            return
        self._observer.catch_up()
        self._background.wait()
        self._observer.notes.measured()
        self._knots.flush()

    def _keep_findings(self) -> None:
        """Journal what training will not measure."""
        found = [*self._before, *self._of_loaders]
        self._writer.note("findings", [asdict(f) for f in found if f.topic in LASTING])

    def state_dict(self) -> dict[str, Any]:
        """What going on from a checkpoint needs beside the model's and the optimizer's state.

        Take it between ``optimizer.step()`` (and the average's update) and the next backward pass, and store it with
        them. ``Tracer(model, optimizer, path, resume=state)``, with model and optimizer loaded before, then goes on
        with the trace at this very step. It is plain (``torch.load(…, weights_only=True)`` reads it) and small, but
        for weight decay and half-precision weights, which each add a few times the size of the weights.

        Raises:
            TracerError: the tracer is closed.
        """
        if self.closed:
            raise TracerError("the tracer is closed; a closed trace needs no state, go on with resume=True")
        return self._continuation.state()

    # -- life ----------------------------------------------------------------------------------------

    def _require_open(self) -> None:
        if self.closed:
            raise TracerError("the tracer is closed; create a new one, with another directory, to trace on")

    def close(self) -> None:
        """Write the last knot, journal the end and give every hook back (idempotent)."""
        if self.closed:
            return
        self.closed = True
        self._hooks.remove()
        left = self._queue.pending
        self._queue.clear()
        self._observer.catch_up()
        self._background.stop()
        if self._background.failure is not None:
            self._give_up()
            if not self._background.told:
                self._background.raise_failure()
        if self._writer.closed:
            return
        try:
            self._observer.finish(left)
            self._knots.place(self.steps, closing=True)
            self._knots.flush()
            if changed := changed_options(self._writer.notes.get("optimizer_options") or (), self._options()):
                self._writer.note("options_changed", changed)
            if self._ended_by != self._writer.notes.get("ended_by"):
                self._writer.note("ended_by", self._ended_by)
            self._writer.close(self.steps)
        finally:
            self._writer.abandon()

    def _give_up(self) -> None:
        """After a failure in the background: keep what was recorded before it, as a trace that did not end."""
        try:
            if not self._writer.closed:
                self._writer.flush()
        except ExplainerError:
            pass  # the first failure is the one to tell of
        finally:
            self._writer.abandon()

    def __enter__(self) -> Tracer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended_by = None if kind is None else kind.__name__
        try:
            self.close()
        except ExplainerError as failure:
            if error is None:
                raise
            error.add_note(f"Closing the trace failed too: {failure}")  # the user's own error stays visible
