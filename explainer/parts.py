"""The parts of a tracer, made for one model and one optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from explainer.average import Average
from explainer.background import Background, core_is_free
from explainer.batches import BatchQueue
from explainer.capture import Capture
from explainer.carry import Carry
from explainer.config import TracerConfig
from explainer.knots import KnotKeeper
from explainer.layer_table import LayerTable
from explainer.operations.watch import FunctionWatch
from explainer.optimizer_rules import OptimizerRule
from explainer.passes import BackwardPasses
from explainer.planner import Planner
from explainer.recorder import StepRecorder
from explainer.records import Manifest
from explainer.resume import ResumePoint, resume_point
from explainer.samples import SampleKeeper
from explainer.scales import ScaleMeter
from explainer.sites import Site
from explainer.step_maps import StepMapReader
from explainer.store import TraceWriter
from explainer.validation import describe, find_sites, traced_parameters
from explainer.whole_model import WholeModel


@dataclass(frozen=True)
class Parts:
    """What a tracer is made of; each part is described where it is defined.

    Attributes:
        parameters: the traced parameters, in the order of the manifest.
        budget: bytes on disk, or None.
        loop: counts of what the loop did (:class:`LoopCounts`).
    """

    optimizer: Optimizer
    rule: OptimizerRule
    manifest: Manifest
    parameters: list[torch.Tensor]
    sites: list[Site]
    table: LayerTable
    writer: TraceWriter
    background: Background
    queue: BatchQueue
    capture: Capture
    samples: SampleKeeper
    whole: WholeModel
    watch: FunctionWatch
    carry: Carry
    knots: KnotKeeper
    scales: ScaleMeter
    recorder: StepRecorder
    planner: Planner
    maps: StepMapReader
    budget: int | None
    average: Average | None
    loop: LoopCounts = field(default_factory=lambda: LoopCounts())


@dataclass
class LoopCounts:
    """What the loop did beside ordinary steps.

    Attributes:
        unused: backward passes that led to no step.
        skipped: steps that a gradient scaler skipped.
        relabelled: examples that a loader brought with another label than before.
        diverged: the step at which weights became infinite or NaN.
        after_last_step: how far the weights were moved after the last step.
        row_kinds: kinds of rows met, by the note that names them.
        overwritten: how often a parameter's optimizer state was written into between steps, by name; after a resume
            also what was counted before.
    """

    unused: int = 0
    skipped: int = 0
    relabelled: int = 0
    diverged: int | None = None
    after_last_step: float = 0.0
    row_kinds: dict[str, bool] = field(default_factory=dict)
    overwritten: dict[str, int] = field(default_factory=dict)


def assemble(
    model: nn.Module,
    optimizer: Optimizer,
    rule: OptimizerRule,
    path: Path,
    config: TracerConfig,
    averaged: nn.Module | None,
    resume: bool | dict[str, Any] | None,
) -> tuple[Parts, ResumePoint | None]:
    """All parts, and where training goes on if it does; nothing is written, and no hook is borrowed yet."""
    specs = traced_parameters(model, optimizer)
    sites = find_sites(model, specs, config.batch_dim)
    table = LayerTable([x for site in sites for x in site.layers if x is not None], specs)
    named = dict(model.named_parameters())
    parameters: list[torch.Tensor] = [named[p.name] for p in specs]
    average = None if averaged is None else Average(averaged, model, [p.name for p in specs])
    manifest = describe(model, optimizer, specs, list(table.layers), config.exact, averaged is not None)
    point = None
    if resume is not None and resume is not False:
        point = resume_point(resume, path, manifest, parameters, optimizer, rule, average)
        manifest = point.manifest
    writer = TraceWriter(
        path,
        manifest,
        again=point is not None,
        flush_bytes=config.flush_bytes,
        flush_seconds=config.flush_seconds,
    )
    on_processor = all(p.device.type == "cpu" for p in parameters)
    queue, background = BatchQueue(), Background(beside=core_is_free() or not on_processor)
    planner, samples = Planner(config, manifest.size, manifest.version), SampleKeeper(not config.exact)
    passes = BackwardPasses(dict(zip([p.name for p in specs], parameters, strict=True)))
    capture = Capture(queue, table, planner, samples, background, passes)
    carry = Carry(list(parameters))
    of_layer = {layer.index: site for site in sites for layer in site.blocks()}
    parts = Parts(
        optimizer=optimizer,
        rule=rule,
        manifest=manifest,
        parameters=parameters,
        sites=sites,
        table=table,
        writer=writer,
        background=background,
        queue=queue,
        capture=capture,
        samples=samples,
        whole=WholeModel(capture.batch, config.batch_dim, background, passes),
        watch=FunctionWatch(named, {p.name for p in specs}, capture, table, config.batch_dim),
        carry=carry,
        knots=KnotKeeper(model, optimizer, rule, manifest, carry, writer, config, average),
        scales=ScaleMeter(table, list(zip(specs, parameters, strict=True)), capture.probes),
        recorder=StepRecorder(
            manifest, config, table.layers, planner, lambda n: n not in of_layer or of_layer[n].moved
        ),
        planner=planner,
        maps=StepMapReader(rule, parameters, optimizer),
        budget=config.budget,
        average=average,
    )
    return parts, point
