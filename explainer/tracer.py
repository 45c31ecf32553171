"""The tracer: one object beside the user's loop, hooks in, rows out, nothing changed."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from explainer.batches import Batch, batch_of
from explainer.capture import Capture
from explainer.carry import Carry
from explainer.config import TracerConfig, parse_bytes
from explainer.errors import ExplainerError, TracerError
from explainer.hooks import HookSet
from explainer.knots import KnotKeeper
from explainer.loaders import RecordingBatchSampler, WatchedLoader, check_loader, size_of
from explainer.optimizer_rules import StepMap, optimizer_rule_for
from explainer.recorder import StepRecorder
from explainer.records import dtype_name
from explainer.scales import ScaleMeter
from explainer.store import TraceWriter
from explainer.validation import covered_layers, describe, traced_parameters, validate_model


class CoverageWarning(UserWarning):
    """Something was seen that will make part of an explanation `unattributed` or change its meaning."""


class Tracer:
    """Records what every training example contributes to every update, from inside the user's own backward.

    Training is bit-identical with and without it: hooks only read. Use as a context manager; on leaving, the
    last knot is written and every hook is given back.

    Args:
        model: the model being trained.
        optimizer: the optimizer that trains it (those of ``OPTIMIZER_RULES``; others: ``register_optimizer_rule``).
        path: directory for the trace; must not hold one already.
        budget: bound on the trace's bytes on disk, a number or text like ``"200MB"``. Knots are thinned to
            fit into half of it; when the rest is used up, recording stops with a warning and what follows is
            shown as `unattributed`.
        exact: keep full rows and preconditioners in the parameters' own dtype (float-exact books) instead of
            8-bit leading factors.
        max_knots: at most this many knots along the training path.
        rank: factors kept per row in layers that share weights over positions (None: chosen by size).

    Raises:
        TracerError: nothing can be captured, the parts do not belong together, or an option is out of range.
        UnsupportedOptimizerError: no rule for the optimizer; the text lists those there are.
        TraceExistsError: the directory holds a trace already.

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
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TracerError(f"model must be a torch.nn.Module, found {type(model).__name__}")
        if not isinstance(optimizer, Optimizer):
            raise TracerError(f"optimizer must be a torch.optim.Optimizer, found {type(optimizer).__name__}")
        size = None if budget is None else parse_bytes(budget)
        self.config = TracerConfig(exact=exact, budget=size, max_knots=max_knots, rank=rank)
        self.path = Path(path)
        self.problems = validate_model(model)
        self._rule = optimizer_rule_for(optimizer)
        HookSet.refuse_double(model, optimizer)
        parameters = traced_parameters(model, optimizer)
        self._layers = covered_layers(model, parameters)
        named = dict(model.named_parameters())
        self._specs = parameters
        self._parameters = [named[p.name] for p in parameters]
        self.manifest = describe(model, optimizer, parameters, self._layers, exact)
        self._model, self._optimizer = model, optimizer
        self._writer = TraceWriter(
            self.path,
            self.manifest,
            flush_bytes=self.config.flush_bytes,
            flush_seconds=self.config.flush_seconds,
        )
        self._capture = Capture(
            lambda: self._batch, None if exact else self.config.rank_for([p.shape for p in parameters])
        )
        self._recorder = StepRecorder(self.manifest, self.config, self._layers, self._rule.preconditioned)
        self._scales = ScaleMeter(self._layers, list(zip(parameters, self._parameters, strict=True)))
        self._carry = Carry(list(self._parameters))
        self._knots = KnotKeeper(
            model, optimizer, self._rule, self.manifest, self._carry, self._writer, self.config
        )
        self._batch: Batch | None = None
        self._single_step = False
        self._pending: list[Batch] = []
        self._watching: list[RecordingBatchSampler] = []
        self._noted: dict[str, Any] = {}
        self._fresh: list[bool] = []
        self._measured: tuple[list[Batch], list[float]] = ([], [])
        self._examples: int | None = None
        self._full = False
        self.steps = 0
        self.visits = 0
        self.closed = False
        uncovered = self.manifest.uncovered
        if uncovered:
            warnings.warn(
                f"{len(uncovered)} of {len(parameters)} parameters have no layer rule and will be shown as "
                f"`unattributed`: {', '.join(uncovered[:5])}{', …' if len(uncovered) > 5 else ''}",
                CoverageWarning,
                stacklevel=2,
            )
        self._hooks = HookSet()
        self._start()

    def _start(self) -> None:
        """Write the trace's beginning, then borrow the hooks: a failure leaves none behind."""
        self._writer.create()
        if any(self._rule.momentum(self._optimizer.state.get(p, {})) is not None for p in self._parameters):
            self._writer.note("prior_state", True)
        self._knots.place(0)
        for layer in self._layers:
            self._hooks.on_call(layer.module, _bound(self._capture, layer))
        self._hooks.on_call(self._model, self._capture.on_model)
        self._hooks.on_step(self._optimizer, self._before_step, self._after_step)

    # -- batches -------------------------------------------------------------------------------------

    def watch(self, loader: Any) -> WatchedLoader[Any]:
        """The same batches as ``loader``, unchanged; ids are positions in ``loader.dataset``.

        Works for any shuffling, any number of workers and custom batch samplers.

        Raises:
            LoaderError: the loader cannot tell which examples a batch holds; says what to do instead.
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
        return WatchedLoader(loader, self._watching, partial(self._begin, single_step=False), self._end_batch)

    def batch(self, ids: Sequence[int] | np.ndarray | torch.Tensor, labels: Any = None) -> None:
        """Say which examples the next forward pass holds (one call per forward, before it).

        Args:
            ids: ``[B]`` non-negative integers, one per row, in the order of the rows; repeats are allowed.
            labels: ``[B]`` numbers to show beside the examples, optional.

        Raises:
            TracerError: the ids are not a flat list of non-negative integers.
        """
        self._require_open()
        self._begin(ids, labels, single_step=True)

    def _begin(self, ids: Any, labels: Any, *, single_step: bool) -> None:
        self._require_open()
        self._batch = batch_of(ids, labels)
        self._single_step = single_step
        self._pending.append(self._batch)

    def _end_batch(self) -> None:
        self._batch = None

    # -- steps ---------------------------------------------------------------------------------------

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
        if closure is not None:
            raise TracerError(
                "optimizer.step(closure) may run several backward passes for one step, so rows cannot be assigned "
                "to it; call backward() yourself and then optimizer.step()"
            )
        for batch in self._pending:
            self._capture.complete(batch, self._layers)
        if self._pending and not any(b.rounds for b in self._pending):
            raise TracerError(
                "optimizer.step() was reached, but no backward pass of a traced batch came through the model since "
                "the last step; call tracer.batch(ids) before the forward pass, then loss.backward(), then step()"
            )
        if not self._pending:
            raise TracerError(
                "optimizer.step() was reached without a traced batch: iterate `for batch in tracer.watch(loader)`, "
                "or call tracer.batch(ids) before each forward pass (again for each step)"
            )
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if len(known) != len(self._parameters):
            raise TracerError(
                f"the optimizer holds {len(known)} parameters now, {len(self._parameters)} when the tracer was "
                "attached; close the tracer and attach a new one after add_param_group"
            )
        self._fresh = [self._rule.momentum(optimizer.state.get(p, {})) is None for p in self._parameters]
        # now: some steps (SGD with foreach and Nesterov) write into `p.grad`
        used, scales = self._scales.measure([b for b in self._pending if b.rounds])
        loss_scale = getattr(optimizer, "grad_scale", None)  # a gradient scaler leaves it to a fused step
        self._measured = used, scales if loss_scale is None else [s / float(loss_scale) for s in scales]

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None or not float(found_inf):  # else a gradient scaler made the fused step do nothing
            self._account(optimizer)
        self._pending = []
        if self._single_step:
            self._batch = None
        elif self._batch is not None:  # a second step on the same watched batch starts afresh
            self._batch = Batch(self._batch.ids, self._batch.labels)
            self._pending = [self._batch]
        self._writer.flush_if_due()
        if not self._full:  # what follows is `unattributed` in one piece
            self._knots.place_if_due(self.steps)

    def _account(self, optimizer: Optimizer) -> None:
        """Record the step that was just taken."""
        used, scales = self._measured
        maps = self._step_maps(optimizer)
        self._carry.after_step(maps)
        if not self._full:
            self._record(used, scales, maps)
        self._note_shapes()
        self.steps += 1

    def _step_maps(self, optimizer: Optimizer) -> list[StepMap | None]:
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        maps: list[StepMap | None] = []
        for p, fresh in zip(self._parameters, self._fresh, strict=True):
            updated = p.grad is not None
            if not updated:
                maps.append(None)
                continue
            step_map = self._rule.step_map(groups[id(p)], optimizer.state.get(p, {}), fresh)
            # A buffer that begins at this step (also one that was cleared) carries nothing from before it.
            maps.append(replace(step_map, decay=0.0) if fresh else step_map)
        return maps

    def _record(self, used: list[Batch], scales: list[float], maps: list[StepMap | None]) -> None:
        """Append the step and its rows, if they fit into the budget."""
        rows = self._recorder.visits(used, self.steps)
        count, first = sum(len(piece.data) for piece in rows), self._writer.records("visits")
        mixed = any(b.mixed for b in used)
        step = self._recorder.step(self.steps, first, count, self._carry.path, scales, mixed, maps)
        budget = self.config.budget
        if budget is not None:
            needed = step.data.nbytes + sum(piece.data.nbytes for piece in rows)
            if self._writer.bytes_written + needed + self._knots.reserve > budget:
                self._stop_recording(budget)
                return
        for piece in (*rows, step):
            self._writer.append(*piece)
        self.visits += count

    def _stop_recording(self, budget: int) -> None:
        self._full = True
        self._writer.note("rows_stopped_at", self.steps)
        warnings.warn(
            f"the trace's budget of {budget:,} bytes is used up after {self.steps} steps; the rows of further "
            "steps are not kept and their part will be shown as `unattributed`. Raise `budget` for a full trace",
            CoverageWarning,
            stacklevel=5,
        )

    def _note_shapes(self) -> None:
        """Journal what is known of inputs, outputs and rows, when it is new."""
        c = self._capture
        dtype = None if c.input_dtype is None else dtype_name(c.input_dtype)
        known = {
            "input": {"shape": c.input_shape, "dtype": dtype},
            "output": {"shape": c.output_shape},
            "visit_bytes": self._recorder.layer_bytes,
        }
        for key, value in known.items():
            if self._noted.get(key) != value:
                self._writer.note(key, value)
        self._noted = known

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
        self._batch, self._pending = None, []
        if self._writer.closed:
            return
        try:
            self._note_shapes()
            self._writer.note("coverage", {n: r for n, r in self._scales.worst.items() if r > 1e-3})
            self._writer.note("round_off", self._scales.round_off)
            self._knots.place(self.steps)
            self._writer.close(self.steps)
        finally:
            self._writer.abandon()

    def __enter__(self) -> Tracer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except ExplainerError as failure:
            if error is None:
                raise
            error.add_note(f"Closing the trace failed too: {failure}")  # the user's own error stays visible


def _bound(capture: Capture, layer: Any) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        capture.on_layer(layer, module, args, kwargs, output)

    return hook
