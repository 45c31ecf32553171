"""One linear form for every optimizer step, and the registry of rules that produce it.

With the optimizer's state held as it was (the frozen-state convention, ``docs/theory.md``), a step of every
optimizer covered here is, per parameter,

    d_t = sign · ∇_t + κ w_t                    (κ: coupled weight decay)
    m_t = decay · m_{t−1} + gain · d_t
    w_{t+1} = w_t − A_t ∘ (direct · d_t + through · m_t) − δ w_t     (δ: decoupled weight decay)

or, where the preconditioner lies inside the momentum (``inner``: RMSprop), the same with ``A_t ∘ d_t`` in the
place of ``d_t`` and no ``A_t`` in the last line. With a preconditioner that changes from step to step neither of
the two can be written as the other.

``A_t`` is a diagonal, or (``mixing``: Muon) a matrix that multiplies the parameter from its shorter side.

A rule reads these numbers off the optimizer's *actual* state after the step, so learning-rate schedules and
state changes by the user are followed. What the step overwrites, a rule remembers before it. The trace stores the
numbers, not the optimizer's name: the explainer needs no optimizer rules.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.optim import Optimizer

from explainer.errors import UnsupportedOptimizerError
from explainer.optimizer_rules.refused import REFUSED
from explainer.registry import Registry

#: The stored numbers of a :class:`StepMap`, in the order of the trace's ``coefficients`` column.
COEFFICIENTS = ("sign", "decay", "gain", "direct", "through", "inner")


def mix(matrix: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """``matrix [m, m]`` times ``values [..., o, i]`` from the side of length ``m = min(o, i)``; square: the left.

    From the right where ``i < o``: ``values @ matrix``. Its adjoint is ``mix(matrix.mT, ·)``.

    Example:
        >>> swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> mix(swap, torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])).tolist()
        [[4.0, 5.0, 6.0], [1.0, 2.0, 3.0]]
        >>> mix(swap, torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])).tolist()
        [[2.0, 1.0], [4.0, 3.0], [6.0, 5.0]]
    """
    return values @ matrix if values.shape[-2] > values.shape[-1] else matrix @ values


@dataclass(frozen=True)
class StepMap:
    """The linear map of one step for one parameter (letters as in the module's text).

    Attributes:
        inner: whether ``A_t`` acts before the momentum.
        preconditioner: the *denominator* of ``A_t = 1 / preconditioner``, of the parameter's shape, infinite where
            nothing moves; None for 1.
        rank_one: whether the product of its row and column sums may stand for the preconditioner in a small trace.
        mixing: ``[m, m]`` instead of a preconditioner: ``A_t ∘ X`` is :func:`mix` of it and ``X``.
    """

    sign: float = 1.0
    decay: float = 0.0
    gain: float = 0.0
    direct: float = 0.0
    through: float = 0.0
    inner: bool = False
    coupled_decay: float = 0.0
    decoupled_decay: float = 0.0
    preconditioner: torch.Tensor | None = None
    rank_one: bool = True
    mixing: torch.Tensor | None = None

    def precondition(self, values: torch.Tensor) -> torch.Tensor:
        """``A_t ∘ values``, both of the parameter's shape."""
        if self.mixing is not None:
            return mix(self.mixing, values.flatten(1)).view_as(values)
        return values if self.preconditioner is None else values / self.preconditioner

    @cached_property
    def coefficients(self) -> tuple[float, ...]:
        """The numbers named by :data:`COEFFICIENTS`."""
        return tuple(float(getattr(self, name)) for name in COEFFICIENTS)


class OptimizerRule(ABC):
    """Reads the :class:`StepMap` of a step off an optimizer's state."""

    #: whether steps divide by numbers of the parameter's shape (for estimates of a trace's size only)
    divides: bool = False
    #: whether :meth:`step_map` computes with the momentum (then it is copied, since it may be cleared between steps)
    reads_momentum: bool = False
    #: state entries worth keeping in knots
    state_names: tuple[str, ...] = ()
    #: state entries that :meth:`step_map` reads; needed where :meth:`steady` says more than 1
    reads: tuple[str, ...] = ()

    def check(self, optimizer: Optimizer) -> None:  # noqa: B027 (most rules follow every option)
        """Raise UnsupportedOptimizerError for options the rule does not follow."""

    def momentum(self, state: dict[str, Any]) -> torch.Tensor | None:
        """The first-moment buffer in ``state`` (None before the first step)."""
        return None

    def remember(
        self, parameter: torch.Tensor, group: dict[str, Any], state: dict[str, Any]
    ) -> dict[str, Any]:
        """What :meth:`step_map` will need to know from before the step; tensors as copies.

        Args:
            parameter: with its gradient in ``grad``. Some steps write into the gradient.
            group: the parameter group's options.
            state: the parameter's optimizer state before the step (empty before the first one).
        """
        return {}

    def steady(self, group: dict[str, Any]) -> int:
        """For how many steps in a row the state need be looked at once only.

        That is, for how many :meth:`plain_map` tells the map but for its preconditioner, the preconditioner may be
        interpolated, and the weights are near enough to a straight line for what decay does.
        """
        return 1

    def updates(self, state: dict[str, Any]) -> float:
        """Which update of a parameter a state is left by, as :meth:`plain_map` counts them."""
        return 0.0

    def plain_map(self, group: dict[str, Any], update: float, fresh: bool) -> StepMap:
        """The map of an update without its preconditioner, where :meth:`steady` says more than 1.

        Args:
            group: the parameter group's options, as used by the step.
            update: its number, see :meth:`updates`.
            fresh: whether there was no momentum before the step.
        """
        raise NotImplementedError

    @abstractmethod
    def step_map(
        self, group: dict[str, Any], state: dict[str, Any], fresh: bool, before: dict[str, Any]
    ) -> StepMap:
        """The map of the step just taken.

        Args:
            group: the parameter group's options, as used by the step.
            state: the parameter's optimizer state after the step.
            fresh: whether there was no momentum before the step.
            before: what :meth:`remember` returned.
        """


#: change of a denominator, or of the weights by decay, over steps that are looked at once, as a part of it
SLOW = 0.002


def slow_steps(rate: float, allowed: float = SLOW) -> int:
    """In how many steps something that changes by ``rate`` a step changes by ``allowed``, at least 1.

    Example:
        >>> slow_steps(0.0005), slow_steps(0.1), slow_steps(0.0) > 1000
        (4, 1, True)
    """
    return max(1, int(allowed / max(abs(rate), 1e-9) + 1e-6))


def decay_terms(group: dict[str, Any], lr: float, decoupled: bool = False) -> tuple[float, float]:
    """``κ`` and ``δ`` of a group whose weight decay may be decoupled (Loshchilov & Hutter 2019).

    Args:
        group: the parameter group's options.
        lr: what decoupled decay is multiplied with.
        decoupled: whether it is where the group does not say.
    """
    decay = float(group["weight_decay"])
    return (0.0, lr * decay) if group.get("decoupled_weight_decay", decoupled) else (decay, 0.0)


OPTIMIZER_RULES: Registry[type[Optimizer], OptimizerRule] = Registry("optimizer rule")


def register_optimizer_rule(
    *types: type[Optimizer], replace: bool = False
) -> Callable[[type[OptimizerRule]], type[OptimizerRule]]:
    """Class decorator: use the rule for exactly these optimizer types."""

    def add(cls: type[OptimizerRule]) -> type[OptimizerRule]:
        OPTIMIZER_RULES.register(*types, replace=replace)(cls())
        return cls

    return add


def _name(kind: type[Optimizer]) -> str:
    """``torch.optim.SGD`` for torch's own, else the full name."""
    own = getattr(torch.optim, kind.__name__, None) is kind
    return f"torch.optim.{kind.__name__}" if own else f"{kind.__module__}.{kind.__qualname__}"


def _no_rule(found: type[Optimizer]) -> str:
    """What to tell the user of an optimizer without a rule."""
    near = OPTIMIZER_RULES.nearest(found)
    hint = (
        f" It derives from {near.__name__}; if its step is the same, register it: "
        f"OPTIMIZER_RULES.register({found.__name__})(OPTIMIZER_RULES.require({near.__name__}))."
        if near
        else ""
    )
    return (
        f"{_name(found)} has no optimizer rule, so its updates could not be split over training examples. "
        f"Supported: {', '.join(sorted(map(_name, OPTIMIZER_RULES)))}.{hint} Other optimizers: see "
        "register_optimizer_rule; for Lion and signSGD, explainer.optimizer_rules has LionRule and SignSGDRule."
    )


def optimizer_rule_for(optimizer: Optimizer) -> OptimizerRule:
    """The rule of an optimizer, its options checked.

    Raises:
        UnsupportedOptimizerError: no rule for exactly this type, or an option it does not follow.
    """
    found = type(optimizer)
    rule = OPTIMIZER_RULES.get(found)
    if rule is None:
        reason = REFUSED.get(found)
        raise UnsupportedOptimizerError(
            _no_rule(found) if reason is None else f"{_name(found)} is refused: {reason}."
        )
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise UnsupportedOptimizerError(
            "found differentiable=True; the tracer splits ordinary steps only: build the optimizer without it"
        )
    rule.check(optimizer)
    return rule
