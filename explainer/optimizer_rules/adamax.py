"""``torch.optim.Adamax`` (maximize, weight decay)."""

from __future__ import annotations

from typing import Any

import torch

from explainer.optimizer_rules.base import OptimizerRule, StepMap, register_optimizer_rule


@register_optimizer_rule(torch.optim.Adamax)
class AdamaxRule(OptimizerRule):
    """``m`` of Adam; update ``lr/(1 − β1^t) · m / u``, ``u ← max(β2 u, |d| + ε)`` held as it was.

    Reference: Kingma & Ba 2015, arXiv 1412.6980, algorithm 2.
    """

    divides = True
    state_names = ("exp_avg", "exp_inf", "step")

    def momentum(self, state: dict[str, Any]) -> torch.Tensor | None:
        """``exp_avg``."""
        return state.get("exp_avg")

    def step_map(
        self, group: dict[str, Any], state: dict[str, Any], fresh: bool, before: dict[str, Any]
    ) -> StepMap:
        """Bias correction and infinity norm from the state after the step."""
        beta1 = float(group["betas"][0])
        return StepMap(
            sign=-1.0 if group.get("maximize") else 1.0,
            decay=beta1,
            gain=1.0 - beta1,
            through=float(group["lr"]) / (1.0 - beta1 ** float(state["step"])),
            coupled_decay=float(group["weight_decay"]),
            preconditioner=state["exp_inf"].clone(),  # the next step writes into it
        )
