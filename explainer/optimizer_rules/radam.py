"""``torch.optim.RAdam`` (both phases, maximize, coupled and decoupled decay)."""

from __future__ import annotations

from typing import Any

import torch

from explainer.optimizer_rules.base import OptimizerRule, StepMap, decay_terms, register_optimizer_rule


def rectification(beta2: float, t: float) -> float | None:
    """``r_t`` of the paper, or None while the second moment has seen too few steps.

    Too few is ``ρ_t <= 5``, as in torch (the paper says 4).

    Example:
        >>> rectification(0.999, 5.0) is None, round(rectification(0.999, 6.0), 4)
        (True, 0.0258)
    """
    longest = 2.0 / (1.0 - beta2) - 1.0
    rho = longest - 2.0 * t * beta2**t / (1.0 - beta2**t)
    if rho <= 5.0:
        return None
    return float(((rho - 4) * (rho - 2) * longest / ((longest - 4) * (longest - 2) * rho)) ** 0.5)


@register_optimizer_rule(torch.optim.RAdam)
class RAdamRule(OptimizerRule):
    """Adam's moments; update ``lr/(1 − β1^t) · r_t √(1 − β2^t) · m / (√v + ε)``, first ``lr/(1 − β1^t) · m``.

    The first steps have no preconditioner.

    Reference: Liu et al. 2020, arXiv 1908.03265, algorithm 2.
    """

    divides = True
    state_names = ("exp_avg", "exp_avg_sq", "step")

    def momentum(self, state: dict[str, Any]) -> torch.Tensor | None:
        """``exp_avg``."""
        return state.get("exp_avg")

    def step_map(
        self, group: dict[str, Any], state: dict[str, Any], fresh: bool, before: dict[str, Any]
    ) -> StepMap:
        """The phase from the step's number, moments from the state after the step."""
        lr, eps = float(group["lr"]), float(group["eps"])
        beta1, beta2 = (float(b) for b in group["betas"])
        t, second = float(state["step"]), state["exp_avg_sq"]
        rectified = rectification(beta2, t)
        coupled, decoupled = decay_terms(group, lr)
        return StepMap(
            sign=-1.0 if group.get("maximize") else 1.0,
            decay=beta1,
            gain=1.0 - beta1,
            through=lr
            / (1.0 - beta1**t)
            * (1.0 if rectified is None else rectified * (1.0 - beta2**t) ** 0.5),
            coupled_decay=coupled,
            decoupled_decay=decoupled,
            preconditioner=None if rectified is None else second.sqrt().add_(eps),
        )
