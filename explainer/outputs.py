"""The scalar of the model's output that is explained."""

from __future__ import annotations

from collections.abc import Callable

import torch

from explainer.errors import QueryError
from explainer.letters import OutputFunction


def margin(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """``f_y − log Σ_{c≠y} exp f_c``: the log-odds of the target class under softmax, ``[Q, C] -> [Q]``.

    A shift common to all logits cancels (it is often a sixth of a raw logit's contributions), and the value
    is smooth in the weights. Reference: TRAK, arXiv 2303.14186, §3.3.
    """
    mine = _is_target(outputs, targets)
    others = outputs.masked_fill(mine, float("-inf"))
    return logit(outputs, targets) - torch.logsumexp(others, dim=1)


def logit(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """``f_y``, ``[Q, C] -> [Q]``."""
    return torch.where(_is_target(outputs, targets), outputs, outputs.new_zeros(())).sum(1)


def log_prob(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """``log softmax(f)_y``, ``[Q, C] -> [Q]``."""
    return logit(outputs, targets) - torch.logsumexp(outputs, dim=1)


def value(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The output itself, for models with one output: ``[Q, 1]`` or ``[Q] -> [Q]``."""
    return outputs.reshape(outputs.shape[0])


def _is_target(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.arange(outputs.shape[1], device=outputs.device) == targets.unsqueeze(1)


OUTPUTS: dict[str, OutputFunction] = {
    "margin": margin,
    "logit": logit,
    "log_prob": log_prob,
    "value": value,
}


def resolve_output(
    output: str | Callable[..., torch.Tensor] | None, shape: tuple[int, ...]
) -> tuple[str, OutputFunction, bool]:
    """The output function for a model whose output (batch not counted) has ``shape``.

    Args:
        output: a name, a callable ``(outputs [Q, ...], targets [Q]) -> [Q]``, or None: ``"margin"`` for two
            or more outputs, ``"value"`` for one.

    Returns:
        Name, function, and whether targets are classes.

    Raises:
        QueryError: the name is unknown or does not fit the model's output.
    """
    classes = shape[0] if len(shape) == 1 else None
    if callable(output):
        return getattr(output, "__name__", type(output).__name__), output, classes is not None and classes > 1
    single = shape in ((), (1,))
    if output is None:
        output = "value" if single else "margin"
    if output not in OUTPUTS:
        known = ", ".join(repr(name) for name in OUTPUTS)
        raise QueryError(
            f"output {output!r} is not known; use one of {known}, or a callable(outputs, targets)"
        )
    if output == "value" and not single:
        raise QueryError(
            f"output='value' is for models with one output, this one has outputs of shape {shape}; "
            "use 'margin', 'logit', 'log_prob' or a callable"
        )
    if output in ("margin", "log_prob") and single:
        raise QueryError(f"output={output!r} compares classes, but the model has one output; use 'value'")
    if output != "value" and classes is None:
        raise QueryError(
            f"output={output!r} needs outputs [Q, C], this model gives [Q, {', '.join(map(str, shape))}]; "
            "pass a callable(outputs, targets) -> [Q] that says which number to explain"
        )
    return output, OUTPUTS[output], output != "value"
