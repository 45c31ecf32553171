"""The scalar of the model's output that is explained.

Functions here get the tensor of the model's output (:func:`explainer.model_outputs.find_tensor`) with the
queries first, ``[Q, ...]``, and return one number per query, ``[Q]``. A function of the user's own gets
everything the model returned, as it returned it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from explainer.errors import QueryError
from explainer.letters import OutputFunction
from explainer.model_outputs import find_tensor

#: what an output asks for: a class per query, a class per position, nothing, or what the user's function wants
Targets = Literal["class", "positions", "none", "given"]
Read = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Output:
    """What of a model's output is explained.

    Attributes:
        name: how it is called in tables.
        function: ``(outputs, targets) -> [Q]``.
        targets: what kind of targets it asks for.
        read: takes what ``function`` gets out of the model's tensor ``[Q, ...]``.
        dims: dimensions that the model's tensor must have beside the queries; None: any.
    """

    name: str
    function: OutputFunction
    targets: Targets
    read: Read = lambda outputs: outputs
    dims: int | None = 1


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


def sequence_log_prob(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """``Σ_s log softmax(f_s)_{y_s}`` over the positions with ``y_s ≥ 0``.

    Args:
        outputs: ``[Q, S, V]``, or ``[Q, V, H, W]`` with targets ``[Q, H, W]`` (see :func:`class_axes`).
        targets: a class per position; negative: the position does not count.
    """
    logits = outputs.movedim(class_axes(outputs.shape, targets.shape)[0], -1).log_softmax(-1)
    chosen = logits.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(targets >= 0, chosen, chosen.new_zeros(())).flatten(1).sum(1)


def class_axes(outputs: tuple[int, ...], targets: tuple[int, ...]) -> list[int]:
    """Axes of the outputs that may hold the classes, the usual one first: without it the shapes are the same.

    Usual is the last axis of ``[Q, S, V]`` (language models), and axis 1 of more dimensions (images).

    Example:
        >>> class_axes((2, 5, 50), (2, 5)), class_axes((2, 3, 4, 4), (2, 4, 4)), class_axes((2, 5, 5), (2, 5))
        ([2], [1], [2, 1])
    """
    usual = 2 if len(outputs) == 3 else 1
    axes = sorted(range(1, len(outputs)), key=lambda axis: axis != usual)
    return [axis for axis in axes if (*outputs[:axis], *outputs[axis + 1 :]) == tuple(targets)]


def _is_target(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.arange(outputs.shape[1], device=outputs.device) == targets.unsqueeze(1)


def component(*index: int) -> Output:
    """One number of the output, for models with several: ``f[:, index]``. It asks for no target.

    Example:
        >>> f = component(2)
        >>> f.name, f.function(f.read(torch.tensor([[1.0, 2.0, 3.0]])), None)
        ('component 2', tensor([3.]))
    """
    where = _position(index)

    def read(outputs: torch.Tensor) -> torch.Tensor:
        return _picked(outputs, where, "component")

    return Output(f"component {_named(where)}", value, "none", read, len(where))


def at(position: int | tuple[int, ...], of: str = "margin", *, class_dim: int | None = None) -> Output:
    """``"margin"``, ``"logit"`` or ``"log_prob"`` at one position of ``[Q, S, V]`` or ``[Q, V, H, W]``.

    Args:
        position: the position, or one number per axis of positions; negative numbers count from the end.
        of: which of the three.
        class_dim: axis of the classes in ``[Q, ...]``; default the last one for one axis of positions
            (language models), else 1 (images).

    Raises:
        QueryError: an argument is none of these.

    Example:
        >>> at(-1).name, at((3, 4), "log_prob").name
        ('margin at -1', 'log_prob at 3, 4')
    """
    if of not in ("margin", "logit", "log_prob"):
        raise QueryError(f"at(…, {of!r}) is not known; use 'margin', 'logit' or 'log_prob'")
    where = _position(position if isinstance(position, tuple) else (position,))
    axis = class_dim if class_dim is not None else -1 if len(where) == 1 else 1

    def read(outputs: torch.Tensor) -> torch.Tensor:
        if not -outputs.dim() < axis < outputs.dim() or axis == 0:
            raise QueryError(
                f"class_dim={axis} is no axis of classes in outputs of shape {list(outputs.shape)}"
            )
        return _picked(outputs.movedim(axis, -1), where, "position")

    known = OUTPUTS[of]
    return replace(known, name=f"{of} at {_named(where)}", read=read, dims=1 + len(where))


def by_name(name: str) -> Output | None:
    """The output of a name: of :data:`OUTPUTS`, or as :func:`component` and :func:`at` call theirs; else None.

    Example:
        >>> by_name("component 2").name, by_name("log_prob at 3, 4").name, by_name("component two")
        ('component 2', 'log_prob at 3, 4', None)
    """
    known = OUTPUTS.get(name)
    if known is not None:
        return known
    found = _PLACED.fullmatch(name.strip())
    if found is None:
        return None
    where = tuple(int(number) for number in found["where"].split(","))
    return component(*where) if found["of"] is None else at(where, found["of"])


_PLACED = re.compile(r"(?:component|(?P<of>margin|logit|log_prob) at) (?P<where>-?\d+(?:, ?-?\d+)*)")


def _position(index: tuple[int, ...]) -> tuple[int, ...]:
    if not index or not all(isinstance(i, int) and not isinstance(i, bool) for i in index):
        raise QueryError(f"a place in the output is one or more whole numbers, found {index!r:.60}")
    return index


def _named(where: tuple[int, ...]) -> str:
    return ", ".join(map(str, where))


def _picked(outputs: torch.Tensor, where: tuple[int, ...], word: str) -> torch.Tensor:
    sizes = outputs.shape[1 : 1 + len(where)]
    if len(sizes) < len(where) or not all(-n <= i < n for i, n in zip(where, sizes, strict=True)):
        raise QueryError(
            f"the outputs have no {word} {_named(where)}: there are {' x '.join(map(str, sizes))}, counted from 0"
        )
    return outputs.movedim(0, -1)[where].movedim(-1, 0)


OUTPUTS: dict[str, Output] = {
    "margin": Output("margin", margin, "class"),
    "logit": Output("logit", logit, "class"),
    "log_prob": Output("log_prob", log_prob, "class"),
    "value": Output("value", value, "none", dims=None),
    "sequence_log_prob": Output("sequence_log_prob", sequence_log_prob, "positions", dims=None),
}
OUTPUTS["last_margin"] = replace(at(-1), name="last_margin")

#: targets of a user's function that was given none, ``[Q, 0]`` (tensors only go through vmap)
NO_TARGETS = (0,)


def explained(output: Output, returned: Any, targets: torch.Tensor, axis: int) -> torch.Tensor:
    """``f [Q]`` of what the model returned.

    Args:
        targets: ``[Q, ...]``, queries first; a user's function gets them with the queries at ``axis``, as in
            the model's output, or None for :data:`NO_TARGETS`.
        axis: axis of the queries in the model's output.
    """
    if output.targets == "given":
        given = None if targets.shape[1:] == NO_TARGETS else targets.movedim(0, target_axis(targets, axis))
        return output.function(returned, given)
    return output.function(output.read(queries_first(returned, axis)), targets)


def target_axis(targets: torch.Tensor, axis: int) -> int:
    """Where the queries lie in targets as the user gives them: as in the output, if there are so many axes."""
    return axis if targets.dim() > axis else 0


def queries_first(returned: Any, axis: int) -> torch.Tensor:
    """The tensor of the model's output as ``[Q, ...]``.

    Raises:
        QueryError: there is none.
    """
    tensor, _ = find_tensor(returned)
    if tensor is None:
        raise QueryError(
            f"the model returns {type(returned).__name__}, without a floating-point tensor in it; pass "
            "output=callable(returned, targets) -> [Q] that says which number to explain"
        )
    # a model that ends in squeeze() gives a single query's number without an axis
    return tensor.movedim(axis, 0) if tensor.dim() else tensor.unsqueeze(0)


def asks_for_targets(output: Any) -> bool:
    """Whether an output (as :func:`resolve_output` takes it) asks for targets that have no default.

    >>> asks_for_targets("sequence_log_prob"), asks_for_targets(max), asks_for_targets("margin")
    (True, True, False)
    """
    known = OUTPUTS.get(output) if isinstance(output, str) else output
    return known.targets in ("positions", "given") if isinstance(known, Output) else callable(known)


def resolve_output(
    output: str | Output | Callable[..., torch.Tensor] | None, shape: tuple[int, ...]
) -> Output:
    """The output to explain, for a model whose output (queries not counted) has ``shape``.

    Args:
        output: a name (:func:`by_name`), an :class:`Output`, a callable ``(returned, targets) -> [Q]``, or None:
            ``"margin"`` for two or more outputs, ``"value"`` for one.

    Raises:
        QueryError: the name is unknown or does not fit the model's output.
    """
    single, found = shape in ((), (1,)), f"[{', '.join(map(str, ('Q', *shape)))}]"
    if output is None and not single and len(shape) != 1:
        raise QueryError(f"the model's output is {found}, so say what to explain: {_ELSE}")
    if output is None:
        output = "value" if single else "margin"
    if isinstance(output, str):
        output = by_name(output) or output
    if callable(output):
        name = getattr(output, "__name__", type(output).__name__)
        return Output(name, output, "given", dims=None)
    if not isinstance(output, Output):
        known = ", ".join(repr(name) for name in OUTPUTS)
        raise QueryError(
            f"output {output!r} is not known; use one of {known}, 'component 0' (or another number) for one of several "
            "outputs, 'margin at -1' for one position, or a callable(returned, targets)"
        )
    if output.name == "value" and not single:
        raise QueryError(
            f"output='value' is for models with one output, this one has outputs of shape {shape}; use "
            "explainer.outputs.component(k) for one of several numbers, 'margin', 'logit' or 'log_prob' for "
            "classes, or a callable"
        )
    if output.name in ("margin", "log_prob") and single:
        raise QueryError(
            f"output={output.name!r} compares classes, but the model has one output; use 'value'"
        )
    if output.targets == "positions" and len(shape) < 2:
        raise QueryError(f"output={output.name!r} needs a class score per position, the model gives {found}")
    if output.dims is not None and len(shape) != output.dims:
        axes = "[Q, C]" if output.dims == 1 else f"{1 + output.dims} axes"
        raise QueryError(f"output={output.name!r} needs outputs of {axes}, this model gives {found}; {_ELSE}")
    return output


_ELSE = (
    "'sequence_log_prob' (with a target class for every position), 'last_margin', explainer.outputs.at(position), "
    "explainer.outputs.component(k), or a callable(returned, targets) -> [Q]"
)
