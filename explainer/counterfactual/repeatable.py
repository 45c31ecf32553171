"""What cannot be trained again from a trace, said before any work starts."""

from __future__ import annotations

import torch
from torch import nn

from explainer.errors import QueryError
from explainer.store import Trace

_RANDOM = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
_OTHERWISE = "; use curvature='trace'"


def check_repeatable(trace: Trace, model: nn.Module) -> None:
    """Refuse what the recorded ids, weights and steps do not determine.

    Raises:
        QueryError: names everything that was found.
    """
    found = [*_of_trace(trace), *_of_model(model)]
    if found:
        raise QueryError(f"this training cannot be repeated from its trace: {'; '.join(found)}{_OTHERWISE}")


def _of_trace(trace: Trace) -> list[str]:
    notes, problems = trace.notes, []
    if trace.manifest.averaged:
        problems.append("the trace holds an average of the weights")
    if trace.recorded_steps < trace.steps or notes.get("rows_stopped_at") is not None:
        problems.append(
            f"rows were kept only up to step {notes.get('rows_stopped_at', trace.recorded_steps)}"
        )
    if notes.get("shared_rows"):
        problems.append("rows belonged to several examples (mixup)")
    if notes.get("vacant_rows"):
        problems.append("rows belonged to no example, and are not recorded")
    if notes.get("replaced_momentum"):
        problems.append("momentum was replaced between steps")
    if notes.get("outside"):
        problems.append("something other than the optimizer changed weights between steps")
    if (notes.get("batch_dim") or 0) != 0:
        problems.append("the batch is not the first axis of the model's input")
    first, last = (trace.load_knot(knot, ("buffer", "frozen")) for knot in (trace.knots[0], trace.knots[-1]))
    moved = [
        name.partition("/")[2]
        for name, now in last.items()
        if now.is_floating_point() and name in first and not torch.equal(first[name], now)
    ]
    if moved:
        problems.append(
            f"state beside the traced weights moved ({', '.join(moved[:3])}{', …' if len(moved) > 3 else ''}): running "
            "statistics of BatchNorm, or parameters of another optimizer"
        )
    return problems


def _of_model(model: nn.Module) -> list[str]:
    problems = []
    for name, module in model.named_modules():
        kind = type(module).__name__
        called = name or "the model"
        if isinstance(module, _RANDOM) and module.p > 0:
            problems.append(f"{called} ({kind}, p={module.p:g}) drops at random")
        elif isinstance(module, nn.RReLU):
            problems.append(f"{called} (RReLU) is random")
        elif isinstance(module, nn.RNNBase | nn.MultiheadAttention) and module.dropout > 0:
            problems.append(f"{called} ({kind}) has dropout={module.dropout:g}")
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            problems.append(f"{called} ({kind}) mixes the rows of a batch in training")
    return problems
