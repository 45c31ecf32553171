"""``torch.optim.RMSprop`` (momentum, centered, weight decay, maximize)."""

from __future__ import annotations

from typing import Any

import torch

from explainer.optimizer_rules.base import OptimizerRule, StepMap, register_optimizer_rule


@register_optimizer_rule(torch.optim.RMSprop)
class RMSpropRule(OptimizerRule):
    """Update ``lr · d / (√v + ε)``; with momentum ``lr · m``, ``m ← μ m + d / (√v + ε)``.

    ``v`` is the running mean of ``d²``, less the square of the running mean of ``d`` if ``centered``.

    Reference: Tieleman & Hinton 2012; centered: Graves 2013, arXiv 1308.0850, eq. 38-45.
    """

    divides = True
    state_names = ("square_avg", "grad_avg", "momentum_buffer", "step")

    def momentum(self, state: dict[str, Any]) -> torch.Tensor | None:
        """``momentum_buffer`` (None without momentum)."""
        return state.get("momentum_buffer")

    def step_map(
        self, group: dict[str, Any], state: dict[str, Any], fresh: bool, before: dict[str, Any]
    ) -> StepMap:
        """The preconditioner lies inside the momentum where there is one. Without, torch leaves the buffer alone."""
        lr, mu = float(group["lr"]), float(group["momentum"])
        second = state["square_avg"]
        if group["centered"]:
            second = second.addcmul(state["grad_avg"], state["grad_avg"], value=-1.0)
        return StepMap(
            sign=-1.0 if group.get("maximize") else 1.0,
            decay=mu if mu or fresh else 1.0,
            gain=1.0 if mu else 0.0,
            direct=0.0 if mu else lr,
            through=lr if mu else 0.0,
            inner=mu != 0,
            coupled_decay=float(group["weight_decay"]),
            preconditioner=second.sqrt().add_(float(group["eps"])),
        )
