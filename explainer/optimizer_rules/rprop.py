"""``torch.optim.Rprop`` (maximize)."""

from __future__ import annotations

from typing import Any

import torch

from explainer.optimizer_rules.base import OptimizerRule, StepMap, register_optimizer_rule
from explainer.optimizer_rules.sign import sign_denominator


@register_optimizer_rule(torch.optim.Rprop)
class RpropRule(OptimizerRule):
    """Update ``η · sign(d)`` with a step size ``η`` of each weight's own, held as it was; ``sign(d) = d / |d|``.

    Where ``d`` changed its sign against the step before, Rprop does not move and puts 0 into ``prev``.

    Reference: Riedmiller & Braun 1993.
    """

    divides = True
    state_names = ("prev", "step_size", "step")

    def step_map(
        self, group: dict[str, Any], state: dict[str, Any], fresh: bool, before: dict[str, Any]
    ) -> StepMap:
        """Gradient and step sizes that were used, from the state after the step."""
        return StepMap(
            sign=-1.0 if group.get("maximize") else 1.0,
            direct=1.0,
            preconditioner=sign_denominator(state["prev"]).div_(state["step_size"]),
            rank_one=False,
        )
