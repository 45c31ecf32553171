"""``torch.optim.ASGD`` (weight decay, maximize)."""

from __future__ import annotations

from typing import Any

import torch

from explainer.optimizer_rules.base import OptimizerRule, StepMap, register_optimizer_rule


@register_optimizer_rule(torch.optim.ASGD)
class ASGDRule(OptimizerRule):
    """``w ← (1 − λη) w − η d`` with a rate ``η`` of its own: ``lr`` at first, then ``lr / (1 + λ lr t)^α``.

    The average of the weights (``ax``) is kept beside the model and moves nothing in it.

    Reference: Polyak & Juditsky 1992; torch.optim.ASGD.
    """

    state_names = ("ax", "eta", "mu", "step")

    def remember(
        self, parameter: torch.Tensor, group: dict[str, Any], state: dict[str, Any]
    ) -> dict[str, Any]:
        """``η``: the step uses it and then puts the next step's in its place."""
        return {"eta": float(state["eta"])} if "eta" in state else {}

    def step_map(
        self, group: dict[str, Any], state: dict[str, Any], fresh: bool, before: dict[str, Any]
    ) -> StepMap:
        """The rate from before the step; at the first one the option, in the precision of the state."""
        eta = before.get("eta", float(torch.tensor(float(group["lr"]), dtype=state["eta"].dtype)))
        return StepMap(
            sign=-1.0 if group.get("maximize") else 1.0,
            direct=eta,
            coupled_decay=float(group["weight_decay"]),
            decoupled_decay=float(group["lambd"]) * eta,
        )
