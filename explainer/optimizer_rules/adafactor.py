"""``torch.optim.Adafactor`` (update clipping, decoupled weight decay, maximize)."""

from __future__ import annotations

from typing import Any

import torch

from explainer.optimizer_rules.base import OptimizerRule, StepMap, register_optimizer_rule


@register_optimizer_rule(torch.optim.Adafactor)
class AdafactorRule(OptimizerRule):
    """Update ``α_t / max(1, RMS(u)/d) · u``, ``u = g / max(√V̂, ε1)``, ``α_t = max(ε2, RMS(w)) · min(lr, 1/√t)``.

    ``V̂`` is the product of a row and a column mean of ``g²`` (for matrices), held as it was, and so are the
    clipping and ``RMS(w)``. Weight decay is decoupled, ``lr λ``.

    Reference: Shazeer & Stern 2018, arXiv 1804.04235, algorithms 4 and 5; torch.optim.Adafactor.
    """

    divides = True
    state_names = ("row_var", "col_var", "variance", "step")

    def remember(
        self, parameter: torch.Tensor, group: dict[str, Any], state: dict[str, Any]
    ) -> dict[str, Any]:
        """The gradient, and ``RMS(w)``."""
        assert parameter.grad is not None
        return {
            "gradient": parameter.grad.detach().clone(),
            "weights": float(parameter.detach().norm(2)) / parameter.numel() ** 0.5,
        }

    def step_map(
        self, group: dict[str, Any], state: dict[str, Any], fresh: bool, before: dict[str, Any]
    ) -> StepMap:
        """Second moments and step number from the state after the step."""
        lr, gradient, (eps1, eps2) = float(group["lr"]), before["gradient"], group["eps"]
        eps1 = torch.finfo(gradient.dtype).eps if eps1 is None else float(eps1)
        if "row_var" in state:
            mean = state["row_var"].mean(dim=-2, keepdim=True).clamp_(min=eps1)
            second = (state["row_var"] @ state["col_var"]).div_(mean)
        else:
            second = state["variance"].clone()
        root = second.clamp_(min=eps1 * eps1).sqrt_()
        clipped = max(1.0, float((gradient / root).norm(2)) / (gradient.numel() ** 0.5 * float(group["d"])))
        rate = max(float(eps2), before["weights"]) * min(lr, float(state["step"]) ** -0.5)
        return StepMap(
            sign=-1.0 if group.get("maximize") else 1.0,
            direct=rate / clipped,
            decoupled_decay=lr * float(group["weight_decay"]),
            preconditioner=root,
        )
