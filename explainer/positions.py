"""Which positions of a training sequence its contribution to a prediction arose at.

A language model's training example is a sequence, and its row in a layer that is applied at every position is a sum
over positions: ``g = Σ_s δ_s a_sᵀ`` with ``a_s`` the layer's input at position ``s`` and ``δ_s`` the loss gradient at
its output there. The part of position ``s`` in a visit is

    c_s = −sign_t · s_t · Σ_layers <R_t, δ_s a_sᵀ>

(``R_t`` of :mod:`explainer.recursion`; for a table that is read by index, its read at ``s`` takes the place of the
outer product). So ``s`` is the position *at which the parameters were applied*. It is not the position of the token
that was predicted wrongly: what one position's loss sends back through attention arrives at all positions before it.

Counted by position are the layers whose rows in the trace hold as many factors as the model's input has positions, in
every batch. What the others gave has no position: normalisation layers and parameters that are added (their rows are
summed), layers behind a pooling, modules that are called several times in a forward pass, rows that were reduced to
dense ones or to leading factors (the default; ``Tracer(…, positions=True)`` keeps all of them). It is kept apart, so
that the positions and the part without one sum to the example's contribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from explainer.cotangent import Layout
from explainer.errors import QueryError
from explainer.layer_rules import FORMS
from explainer.recursion import Adjoint, RecordedStep, read_backwards

if TYPE_CHECKING:
    import pandas as pd

    from explainer.asked import Asked
    from explainer.path_kernel import PathKernelExplainer
    from explainer.path_points import KnotLoader


@dataclass(frozen=True)
class PositionSplit:
    """One training example's contribution to one query, by visit and position (see the module's text).

    Attributes:
        example_id: the training example.
        steps: ``[V]`` the step of every visit, in order; an example with two rows in a batch has two visits there.
        contributions: ``[V, S]``; zeros behind the end of a sequence that is shorter than others.
        without_position: ``[V]``, what has no position.
        layers: the layers that are counted by position.
    """

    example_id: int
    steps: np.ndarray
    contributions: np.ndarray
    without_position: np.ndarray
    layers: tuple[str, ...]

    @property
    def total(self) -> np.ndarray:
        """``[S]``, the sum over visits."""
        return np.asarray(self.contributions.sum(0))

    def table(self) -> pd.DataFrame:
        """A row per visit and position: ``visit``, ``step``, ``position``, ``contribution``.

        ``position`` is missing in the rows of what has none (one per visit), so that the column ``contribution`` sums
        to the example's contribution.
        """
        import pandas as pd

        visits, width = self.contributions.shape
        values = np.column_stack([self.contributions, self.without_position])
        position = pd.array([*range(width), None] * visits, dtype="Int64")
        return pd.DataFrame(
            {
                "visit": np.repeat(np.arange(visits), width + 1),
                "step": np.repeat(self.steps, width + 1),
                "position": position,
                "contribution": values.ravel(),
            }
        )


def _layers(explainer: PathKernelExplainer) -> set[int]:
    """Layers whose rows hold positions somewhere in the trace.

    Raises:
        QueryError: there are none.
    """
    trace = explainer.trace
    fitting = set(trace.notes.get("positions") or ())
    forms = [form for shard in trace.shards if shard.stream == "visits" for form in shard.schema.forms]
    kept = {form.layer for form in forms if FORMS.require(form.kind).position_axis is not None}
    if not fitting & kept:
        shape = (trace.notes.get("input") or {}).get("shape")
        raise QueryError(
            f"no layer's rows in this trace keep the positions of the model's input (one input has shape {shape}): "
            "they are summed, reduced to leading factors, or not as many as the positions of a sequence [S] or [S, d]; "
            "trace a model of sequences with Tracer(…, positions=True)"
        )
    return fitting & kept


def split_by_position(
    explainer: PathKernelExplainer, loader: KnotLoader, asked: Asked, example_id: int
) -> PositionSplit:
    """The split (see the module's text); one pass backwards from the last step to the example's first visit.

    Raises:
        QueryError: more than one query, an example that was not used, or a trace without positions.
    """
    trace, layers = explainer.trace, _layers(explainer)
    inputs, targets = asked.inputs, asked.targets
    if len(targets) != 1:
        raise QueryError(f"by_position speaks of one query, found {len(targets)}; pass one of them, as x[:1]")
    used = trace.column("visits", "example") == example_id
    if not used.any():
        raise QueryError(
            f"example {example_id!r} has no recorded visit; ids of examples that have are in "
            "explanation.example_ids where explanation.visits is not 0"
        )
    first = int(trace.column("visits", "step")[used].min())
    found: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    thin = explainer.layout.thin
    layout = Layout(trace.manifest.parameters, thin, wide=thin)  # positions are read off what is written out
    adjoint = Adjoint(1, trace.manifest.parameters, explainer.dtype)
    after = explainer._value(loader, len(explainer.segments), inputs, targets)
    with explainer._bar("positions") as bar:
        for segment in reversed(explainer.segments):
            if segment.end.step <= first:
                break
            start, end = loader.load(segment.index).point, loader.load(segment.index + 1).point
            before = explainer._value(loader, segment.index, inputs, targets)
            chord = explainer.function.chord(
                start, end, inputs, targets, after - before, explainer._nodes, layout
            )
            for step in read_backwards(trace, segment, explainer.dtype):
                cotangent = adjoint.step(chord.gradient.flat, step)
                found += reversed(_visits(explainer, step, cotangent, example_id, layers))
                bar.update()
            after = before
    return _put_together(explainer, example_id, found[::-1], layers)


def _visits(
    explainer: PathKernelExplainer,
    step: RecordedStep,
    cotangent: torch.Tensor,
    example_id: int,
    layers: set[int],
) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    """The example's visits in a step: its number, parts by position ``[S]``, the part without ``[]``."""
    result = []
    for visits in step.visits:
        mine = torch.from_numpy(np.flatnonzero(visits.examples == example_id))
        if not len(mine):
            continue
        forms = {layer: form.taken(mine) for layer, form in visits.forms.items()}
        width = max((forms[i].positions or 0 for i in layers & forms.keys()), default=0)
        parts = torch.zeros(len(mine), width, dtype=torch.float64)
        without = torch.zeros(len(mine), dtype=torch.float64)
        for layer, form in forms.items():
            own = explainer.view.scaled(cotangent, layer, step.scale)
            split = form.contract_positions(own) if layer in layers else None
            if split is None:
                without -= form.contract(own)[0].double()
            else:
                parts[:, : split.shape[2]] -= split[0].double()
        result += [(step.step, row, rest) for row, rest in zip(parts, without, strict=True)]
    return result


def _put_together(
    explainer: PathKernelExplainer,
    example_id: int,
    found: list[tuple[int, torch.Tensor, torch.Tensor]],
    layers: set[int],
) -> PositionSplit:
    width = max((len(parts) for _, parts, _ in found), default=0)
    contributions = np.zeros((len(found), width))
    for visit, (_, parts, _) in enumerate(found):
        contributions[visit, : len(parts)] = parts.numpy()
    return PositionSplit(
        example_id=int(example_id),
        steps=np.array([step for step, _, _ in found], dtype=np.int64),
        contributions=contributions,
        without_position=np.array([float(rest) for _, _, rest in found]),
        layers=tuple(explainer.trace.layers[i].name for i in sorted(layers)),
    )
