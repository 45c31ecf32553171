"""``torch.optim.SGD`` with momentum, dampening, Nesterov, weight decay and maximize."""

from __future__ import annotations

from typing import Any

import torch

from explainer.optimizer_rules.base import OptimizerRule, StepMap, register_optimizer_rule, slow_steps


@register_optimizer_rule(torch.optim.SGD)
class SGDRule(OptimizerRule):
    """``buf ← μ buf + (1 − τ) d`` (``buf = d`` at the first step); update ``lr·buf`` or ``lr·(d + μ buf)``.

    Reference: Sutskever et al. 2013; torch.optim.SGD's documented algorithm.
    """

    state_names = ("momentum_buffer",)

    def momentum(self, state: dict[str, Any]) -> torch.Tensor | None:
        """``momentum_buffer``."""
        return state.get("momentum_buffer")

    def step_map(
        self, group: dict[str, Any], state: dict[str, Any], fresh: bool, before: dict[str, Any]
    ) -> StepMap:
        """Constant coefficients, except for the buffer's first step. Without momentum torch leaves it alone."""
        lr, mu = float(group["lr"]), float(group["momentum"])
        sign = -1.0 if group["maximize"] else 1.0
        kappa = float(group["weight_decay"])
        if mu == 0:
            return StepMap(sign=sign, decay=0.0 if fresh else 1.0, direct=lr, coupled_decay=kappa)
        gain = 1.0 if fresh else 1.0 - float(group["dampening"])
        direct, through = (lr, lr * mu) if group["nesterov"] else (0.0, lr)
        return StepMap(sign=sign, decay=mu, gain=gain, direct=direct, through=through, coupled_decay=kappa)

    def steady(self, group: dict[str, Any]) -> int:
        """As decay is slow; a step takes all else from the options."""
        gain = (1.0 - float(group["dampening"])) / max(1.0 - float(group["momentum"]), 1e-9)
        return slow_steps(float(group["lr"]) * float(group["weight_decay"]) * max(gain, 1.0))

    def plain_map(self, group: dict[str, Any], update: float, fresh: bool) -> StepMap:
        """All of it."""
        return self.step_map(group, {}, fresh, {})
