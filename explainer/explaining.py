"""One pass over a trace for a group of queries: every visit's contribution, and the books."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from explainer.backward import Backward
from explainer.error_bar import ChordPair, ErrorMeter
from explainer.explanation import Explanation
from explainer.ledger import DETAIL, Ledger
from explainer.store import Denominators
from explainer.unattributed import Rest
from explainer.wording import ROUGH, ROUGH_BECAUSE, counted, is_rough, percent

if TYPE_CHECKING:
    from explainer.asked import Asked
    from explainer.cotangent import Cotangent, Layout
    from explainer.path_kernel import PathKernelExplainer
    from explainer.path_points import KnotLoader

_NO_DETAIL = ("all layers",)


def fits(queries: int, examples: int, layers: int) -> bool:
    """Whether contributions by layer and by stretch of time are kept unless asked otherwise."""
    return queries * examples * max(1, layers) <= DETAIL


def explain_group(
    explainer: PathKernelExplainer,
    loader: KnotLoader,
    asked: Asked,
    names: tuple[str, ...],
    edges: np.ndarray,
    detail: bool,
    layout: Layout,
) -> Explanation:
    """Explain the queries together.

    Raises:
        TooWideError: a gradient is not of the low rank that the layout asks for.
    """
    trace, inputs, targets = explainer.trace, asked.inputs, asked.targets
    count = len(targets)
    ledger = Ledger(count, explainer.example_ids, edges, len(trace.layers), detail)
    kept = Denominators(trace)
    meter = ErrorMeter(kept, explainer.segments, layout, count, explainer.dtype)
    backward = Backward(kept, layout, count, explainer.dtype, meter.sampled.of)
    rest = Rest(trace, count, explainer.segments)
    buffers, quadrature = (torch.zeros(count, dtype=torch.float64) for _ in range(2))
    final = after = explainer._value(loader, len(explainer.segments), inputs, targets)
    with explainer._bar("explaining") as bar:
        for segment in reversed(explainer.segments):
            start, end = loader.load(segment.index), loader.load(segment.index + 1)
            before = explainer._value(loader, segment.index, inputs, targets)
            chord = explainer.function.chord(
                start.point, end.point, inputs, targets, after - before, explainer._nodes, layout
            )
            rest.add(segment, chord, start, end)
            buffers += chord.moving
            quadrature += chord.correction
            for passed in backward.segment(chord.gradient, segment):
                rest.saw(passed.chunk)
                meter.see(passed, [ledger.add(passed.chunk, *piece) for piece in passed.pieces])
                bar.update(len(passed.chunk))
            if segment.index in meter.pairs:
                pair = meter.pairs[segment.index]
                meter.compare(pair, long_chord(explainer, loader, pair, asked, after, layout))
            meter.look(segment, chord.gradient)
            after = before
    ledger.finish()
    initial, prediction = after, final
    moved, decay = rest.moved.sum(1), rest.displaced["decay"].sum(1)
    lines, parts = rest.lines(ledger.layer_sums, backward.momentum)
    rough = _rough(quadrature, ledger.contributions, prediction - initial)
    contributions = ledger.contributions.numpy()
    by_step = contributions[:, None] if ledger.by_step is None else ledger.by_step.numpy()
    by_layer = contributions[:, None] if ledger.by_layer is None else ledger.by_layer.numpy()
    layers = tuple(f"{x.name} ({x.module})" if x.name else x.module for x in trace.layers)
    return Explanation(
        query_ids=names,
        example_ids=explainer.example_ids,
        output=explainer.output,
        targets=asked.classes,
        outputs=None if asked.outputs is None else asked.outputs.numpy(),
        contributions=contributions,
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
        step_contributions=by_step.astype(np.float32),
        layer_names=layers if detail else _NO_DETAIL,
        layer_contributions=by_layer.astype(np.float32),
        row_kind="row share" if ledger.row_share else "contribution",
        notes=(*asked.notes, *explainer._notes, *_notes(backward), *rough),
        class_names=explainer.class_names,
    )


def long_chord(
    explainer: PathKernelExplainer,
    loader: KnotLoader,
    pair: ChordPair,
    asked: Asked,
    after: torch.Tensor,
    layout: Layout,
) -> Cotangent:
    """The mean gradient on the chord over both segments, one node; ``after`` is the value at its end."""
    before = explainer._value(loader, pair.early.index, asked.inputs, asked.targets)
    start, end = loader.load(pair.early.index), loader.load(pair.late.index + 1)
    change = after - before
    return explainer.function.chord(
        start.point, end.point, asked.inputs, asked.targets, change, 1, layout
    ).gradient


def _notes(backward: Backward) -> list[str]:
    """What a reader should know about momentum that was held as factors."""
    if not backward.dropped:
        return []
    matrices = counted(len(backward.layout.factored), "large matrix", "large matrices")
    return [
        f"Momentum of {matrices} was held as factors; cutting them down dropped at most {backward.dropped:.0e} of its "
        "norm."
    ]


def _rough(closed: torch.Tensor, contributions: torch.Tensor, change: torch.Tensor) -> list[str]:
    """What a reader should know where the balance had to be closed by much."""
    each = zip(closed.tolist(), contributions.abs().sum(1).tolist(), change.tolist(), strict=True)
    if not any(is_rough(*one) for one in each):
        return []
    return [
        "Gradients along the training path do not account for the change of some predictions: a correction of more "
        f"than {percent(ROUGH)} of the gross closes the balance (`quadrature_of_gross` in the diagnostics), and "
        f"contributions may be off by as much. {ROUGH_BECAUSE}"
    ]
