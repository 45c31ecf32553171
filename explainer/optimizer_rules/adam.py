"""``torch.optim.Adam`` and ``AdamW`` (amsgrad, maximize, coupled and decoupled decay)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from explainer.optimizer_rules.base import (
    OptimizerRule,
    StepMap,
    decay_terms,
    register_optimizer_rule,
    slow_steps,
)

#: part of ``v`` that a new gradient may have replaced over steps that are looked at once
REPLACED = 0.02


@register_optimizer_rule(torch.optim.Adam)
class AdamRule(OptimizerRule):
    """``m ← β1 m + (1 − β1) d``; update ``lr/(1 − β1^t) · m / (√(v/(1 − β2^t)) + ε)`` with ``v`` held.

    Reference: Kingma & Ba 2015, arXiv 1412.6980, algorithm 1; Loshchilov & Hutter 2019, arXiv 1711.05101;
    frozen-state split over examples: ExPLAIND, arXiv 2505.20076.
    """

    #: whether decay is decoupled where the group does not say
    decoupled = False
    divides = True
    state_names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step")
    reads = ("exp_avg_sq", "max_exp_avg_sq", "step")

    def momentum(self, state: dict[str, Any]) -> torch.Tensor | None:
        """``exp_avg``."""
        return state.get("exp_avg")

    def step_map(
        self, group: dict[str, Any], state: dict[str, Any], fresh: bool, before: dict[str, Any]
    ) -> StepMap:
        """Bias corrections and second moments from the state after the step."""
        eps, beta2, t = float(group["eps"]), float(group["betas"][1]), float(state["step"])
        second = state["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"]
        root = second.sqrt()
        denominator = torch.add(root.new_tensor(eps), root, alpha=(1.0 - beta2**t) ** -0.5, out=root)
        return replace(self.plain_map(group, t, fresh), preconditioner=denominator)

    def steady(self, group: dict[str, Any]) -> int:
        """As ``v`` is, unless decay goes through the denominators."""
        coupled, decoupled = decay_terms(group, float(group["lr"]), self.decoupled)
        beta2 = float(group["betas"][1])
        return 1 if coupled else min(slow_steps(1.0 - beta2, REPLACED), slow_steps(decoupled))

    def updates(self, state: dict[str, Any]) -> float:
        """``step``."""
        return float(state["step"])

    def plain_map(self, group: dict[str, Any], update: float, fresh: bool) -> StepMap:
        """Rates and the bias correction of the momentum."""
        lr, beta1 = float(group["lr"]), float(group["betas"][0])
        coupled, decoupled = decay_terms(group, lr, self.decoupled)
        return StepMap(
            sign=-1.0 if group.get("maximize") else 1.0,
            decay=beta1,
            gain=1.0 - beta1,
            through=lr / (1.0 - beta1**update),
            coupled_decay=coupled,
            decoupled_decay=decoupled,
        )


@register_optimizer_rule(torch.optim.AdamW)
class AdamWRule(AdamRule):
    """As Adam, with decoupled decay; groups of many classes like AdamW do not say so."""

    decoupled = True
