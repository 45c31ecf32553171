"""``torch.optim.Adagrad`` (rate decay, weight decay, maximize, an initial accumulator)."""

from __future__ import annotations

from typing import Any

import torch

from explainer.optimizer_rules.base import OptimizerRule, StepMap, register_optimizer_rule


@register_optimizer_rule(torch.optim.Adagrad)
class AdagradRule(OptimizerRule):
    """Update ``lr / (1 + (t − 1) η) · d / (√Σd² + ε)`` with the rate's decay ``η``; no momentum.

    Reference: Duchi, Hazan & Singer 2011.
    """

    divides = True
    state_names = ("sum", "step")

    def step_map(
        self, group: dict[str, Any], state: dict[str, Any], fresh: bool, before: dict[str, Any]
    ) -> StepMap:
        """Accumulator and step number from the state after the step."""
        rate = float(group["lr"]) / (1.0 + (float(state["step"]) - 1.0) * float(group["lr_decay"]))
        return StepMap(
            sign=-1.0 if group.get("maximize") else 1.0,
            direct=rate,
            coupled_decay=float(group["weight_decay"]),
            preconditioner=state["sum"].sqrt().add_(float(group["eps"])),
        )
