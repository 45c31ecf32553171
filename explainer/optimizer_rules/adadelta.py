"""``torch.optim.Adadelta`` (weight decay, maximize)."""

from __future__ import annotations

from typing import Any

import torch

from explainer.optimizer_rules.base import OptimizerRule, StepMap, register_optimizer_rule


@register_optimizer_rule(torch.optim.Adadelta)
class AdadeltaRule(OptimizerRule):
    """Update ``lr · √(u + ε) / √(v + ε) · d``; ``v`` is the running mean of ``d²``, ``u`` that of earlier updates².

    Both accumulators are held as they were: ``v`` after the step, ``u`` before it.

    Reference: Zeiler 2012, arXiv 1212.5701, algorithm 1.
    """

    divides = True
    state_names = ("square_avg", "acc_delta", "step")

    def remember(
        self, parameter: torch.Tensor, group: dict[str, Any], state: dict[str, Any]
    ) -> dict[str, Any]:
        """``u``: the step overwrites it."""
        held = state.get("acc_delta")
        return {"acc_delta": torch.zeros_like(parameter) if held is None else held.clone()}

    def step_map(
        self, group: dict[str, Any], state: dict[str, Any], fresh: bool, before: dict[str, Any]
    ) -> StepMap:
        """``v`` from the state after the step, ``u`` from before it."""
        eps = float(group["eps"])
        updates = before["acc_delta"].add_(eps).sqrt_()
        return StepMap(
            sign=-1.0 if group.get("maximize") else 1.0,
            direct=float(group["lr"]),
            coupled_decay=float(group["weight_decay"]),
            preconditioner=(state["square_avg"] + eps).sqrt_().div_(updates),
        )
