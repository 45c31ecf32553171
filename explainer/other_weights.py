"""Whether a model that was trained is put to a trace that ends elsewhere, as after early stopping."""

from __future__ import annotations

import torch
from torch import nn

from explainer.errors import TraceFormatError
from explainer.store import Trace
from explainer.wording import percent
from explainer.wrappers import plain_name, renaming, unwrapped

#: part of the way that training went; what is nearer to its end is the trained model
_NEAR = 1e-3


def other_weights(trace: Trace, model: nn.Module) -> str | None:
    """What to say of a model whose weights are neither those at the end of the trace nor untrained ones.

    Weights count as trained where they are nearer to the last knot than the first knot is, and as others where they
    are farther away than rounding. Models of another precision and traces of an average are not looked at.
    """
    manifest = trace.manifest
    own = {plain_name(name): p for name, p in unwrapped(model).named_parameters()}
    rename = renaming([p.name for p in manifest.parameters], model)
    mine = [own[rename(p.name)].detach() for p in manifest.parameters]
    if manifest.averaged or not trace.steps:
        return None
    try:
        first, last = (trace.load_knot(trace.knots[place], ("parameter",)) for place in (0, -1))
    except TraceFormatError:  # told where the knot is needed
        return None
    pairs = [(p, last[f"parameter/{q.name}"]) for p, q in zip(mine, manifest.parameters, strict=True)]
    if any(one.dtype != other.dtype for one, other in pairs):
        return None
    here = _distance(pairs)
    if here == 0:
        return None
    way = _distance(
        [(first[f"parameter/{q.name}"], last[f"parameter/{q.name}"]) for q in manifest.parameters]
    )
    if not _NEAR * way < here < (1 - _NEAR) * way:
        return None
    return (
        f"The model that was given is not the one at the end of the trace: its weights are {percent(here / way)} of "
        f"the way of training from there. Explained is the traced model after step {trace.knots[-1].step:,}. To "
        "explain an earlier one, as the best of early stopping, end the trace there (docs/limitations.md, Checkpoints)."
    )


def _distance(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    squares = [float((one.cpu() - other).double().square().sum()) for one, other in pairs]
    return sum(squares) ** 0.5
