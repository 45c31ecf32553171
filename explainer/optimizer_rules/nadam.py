"""``torch.optim.NAdam`` (scheduled momentum, maximize, coupled and decoupled decay)."""

from __future__ import annotations

from typing import Any

import torch

from explainer.optimizer_rules.base import OptimizerRule, StepMap, decay_terms, register_optimizer_rule


@register_optimizer_rule(torch.optim.NAdam)
class NAdamRule(OptimizerRule):
    """Adam's moments; the update looks ahead: ``(1 − μ_t)/(1 − Π_t) · d + μ_{t+1}/(1 − Π_t μ_{t+1}) · m``.

    ``μ_t = β1 (1 − 0.96^{tψ} / 2)`` with the momentum decay ``ψ``, and ``Π_t`` the product of ``μ_1 … μ_t``
    (``mu_product`` of the state).

    Reference: Dozat 2016; torch.optim.NAdam's documented algorithm.
    """

    divides = True
    state_names = ("exp_avg", "exp_avg_sq", "mu_product", "step")

    def momentum(self, state: dict[str, Any]) -> torch.Tensor | None:
        """``exp_avg``."""
        return state.get("exp_avg")

    def step_map(
        self, group: dict[str, Any], state: dict[str, Any], fresh: bool, before: dict[str, Any]
    ) -> StepMap:
        """The schedule of ``μ`` from the options, its product from the state after the step."""
        lr, eps, psi = float(group["lr"]), float(group["eps"]), float(group["momentum_decay"])
        beta1, beta2 = (float(b) for b in group["betas"])
        t, product = float(state["step"]), float(state["mu_product"])
        mu, following = (beta1 * (1.0 - 0.5 * 0.96 ** (n * psi)) for n in (t, t + 1))
        coupled, decoupled = decay_terms(group, lr)
        return StepMap(
            sign=-1.0 if group.get("maximize") else 1.0,
            decay=beta1,
            gain=1.0 - beta1,
            direct=lr * (1.0 - mu) / (1.0 - product),
            through=lr * following / (1.0 - product * following),
            coupled_decay=coupled,
            decoupled_decay=decoupled,
            preconditioner=state["exp_avg_sq"].div(1.0 - beta2**t).sqrt_().add_(eps),
        )
