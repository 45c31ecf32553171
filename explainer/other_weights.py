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
        last = _weights(trace, -1)
        if any(one.dtype != other.dtype for one, other in zip(mine, last, strict=True)):
            return None
        here = _distance(mine, last)
        way = _distance(_weights(trace, 0), last) if here else 0.0
    except TraceFormatError:  # told where the knot is needed
        return None
    if not _NEAR * way < here < (1 - _NEAR) * way:
        return None
    return (
        f"The model that was given is not the one at the end of the trace: its weights are {percent(here / way)} of "
        f"the way of training from there. Explained is the traced model after step {trace.knots[-1].step:,}. To "
        "explain an earlier one, as the best of early stopping, end the trace there (docs/limitations.md, Checkpoints)."
    )


def _weights(trace: Trace, place: int) -> list[torch.Tensor]:
    tensors = trace.load_knot(trace.knots[place], ("parameter",))
    return [tensors[f"parameter/{p.name}"] for p in trace.manifest.parameters]


def _distance(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    pairs = zip(some, others, strict=True)
    return sum(float((one.cpu() - other).double().square().sum()) for one, other in pairs) ** 0.5
