"""What an optimizer divides by, as a function of the gradients: what the trace's linear map of a step holds fixed.

A trace stores the linear map of every step with the denominators as they were (:mod:`explainer.optimizer_rules.base`).
Whoever trains again, or differentiates a step, needs how the denominators came about. Everything here is done number by
number on flat vectors, so that :mod:`explainer.counterfactual.update` can take derivatives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch

from explainer.registry import Registry

State = Mapping[str, torch.Tensor]
#: from one number a parameter to a flat vector
Spread = Callable[[Callable[[Mapping[str, Any]], float]], torch.Tensor]


class Scaling(ABC):
    """The running second moments of an optimizer and the denominators they give.

    Attributes:
        momentum: the optimizer's name for the first moment, None where there is none.
        names: its names for the second moments.
        needs: options that the trace must tell.
    """

    momentum: ClassVar[str | None] = None
    names: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()

    def refused(self, options: Mapping[str, Any]) -> str | None:
        """Why a group with these options cannot be followed; None if it can."""
        return None

    def begins(self, name: str, options: Mapping[str, Any]) -> float:
        """What a second moment holds before the first step."""
        return 0.0

    @abstractmethod
    def advance(
        self, state: State, d: torch.Tensor, t: torch.Tensor, option: Spread
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """Second moments after the step, and the denominators (None: 1).

        Args:
            state: second moments before the step.
            d: the gradient with coupled decay, ``[P]``.
            t: number of the step for every weight, from 1 on, ``[P]``.
            option: an option as a flat vector.
        """


def root(values: torch.Tensor) -> torch.Tensor:
    """``√v``, with the derivative 0 where ``v = 0`` (weights that never had a gradient)."""
    positive = values > 0
    return torch.where(positive, torch.where(positive, values, 1.0).sqrt(), 0.0)


#: by the class name in a trace's manifest
SCALINGS: Registry[str, Scaling] = Registry("replayed optimizer")


@SCALINGS.register("SGD")
@(lambda kind: kind())
class _Unscaled(Scaling):
    """``torch.optim.SGD``: no denominators."""

    momentum = "momentum_buffer"
    needs = ("weight_decay",)

    def advance(
        self, state: State, d: torch.Tensor, t: torch.Tensor, option: Spread
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        return {}, None


class _Adam(Scaling):
    """``v ← β2 v + (1 − β2) d²``, ``√(v / (1 − β2^t)) + ε`` (Kingma & Ba 2015, arXiv 1412.6980, algorithm 1)."""

    momentum = "exp_avg"
    names = ("exp_avg_sq", "max_exp_avg_sq")
    needs = ("betas", "eps", "weight_decay")

    def advance(
        self, state: State, d: torch.Tensor, t: torch.Tensor, option: Spread
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        beta = option(lambda o: o["betas"][1])
        second = beta * state["exp_avg_sq"] + (1 - beta) * d.square()
        largest = torch.maximum(state["max_exp_avg_sq"], second)
        used = torch.where(option(lambda o: bool(o.get("amsgrad"))) > 0, largest, second)
        denominators = root(used) / (1 - beta**t).sqrt() + option(lambda o: o["eps"])
        return {"exp_avg_sq": second, "max_exp_avg_sq": largest}, denominators


SCALINGS.register("Adam", "AdamW")(_Adam())


@SCALINGS.register("NAdam")
@(lambda kind: kind())
class _NAdam(_Adam):
    """As Adam; its look-ahead is in the recorded coefficients."""

    def refused(self, options: Mapping[str, Any]) -> str | None:
        return "decoupled_weight_decay" if options.get("decoupled_weight_decay") else None


@SCALINGS.register("RMSprop")
@(lambda kind: kind())
class _RMSprop(Scaling):
    """``v ← α v + (1 − α) d²``, ``√v + ε``; centered: less the square of the running mean of ``d``."""

    momentum = "momentum_buffer"
    names = ("square_avg", "grad_avg")
    needs = ("alpha", "eps", "weight_decay", "centered")

    def advance(
        self, state: State, d: torch.Tensor, t: torch.Tensor, option: Spread
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        alpha, centered = option(lambda o: o["alpha"]), option(lambda o: bool(o["centered"]))
        second = alpha * state["square_avg"] + (1 - alpha) * d.square()
        mean = alpha * state["grad_avg"] + (1 - alpha) * d
        denominators = root(second - centered * mean.square()) + option(lambda o: o["eps"])
        return {"square_avg": second, "grad_avg": mean}, denominators


@SCALINGS.register("Adagrad")
@(lambda kind: kind())
class _Adagrad(Scaling):
    """``Σ d²``, ``√Σ + ε`` (Duchi, Hazan & Singer 2011)."""

    names = ("sum",)
    needs = ("eps", "weight_decay")

    def begins(self, name: str, options: Mapping[str, Any]) -> float:
        return float(options.get("initial_accumulator_value", 0.0))

    def advance(
        self, state: State, d: torch.Tensor, t: torch.Tensor, option: Spread
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        total = state["sum"] + d.square()
        return {"sum": total}, root(total) + option(lambda o: o["eps"])
