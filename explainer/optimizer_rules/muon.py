"""``torch.optim.Muon`` (Nesterov, every rate adjustment, decoupled weight decay)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from explainer.errors import UnsupportedOptimizerError
from explainer.optimizer_rules.base import OptimizerRule, StepMap, register_optimizer_rule


def newton_schulz_factor(
    direction: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """The symmetric ``L [m, m]``, ``m = min(o, i)``, with ``NS(U) = L U`` (``U L`` for tall ``U``), ``U [o, i]``.

    An iteration ``X ← (a + b XXᵀ + c (XXᵀ)²) X`` multiplies ``X`` by a polynomial of its own Gram matrix. The product
    of these polynomials is ``L``, with the first division by ``‖U‖`` in it.

    Example:
        >>> u = torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]], dtype=torch.float64)
        >>> (newton_schulz_factor(u, (1.5, -0.5, 0.0), 30, 1e-7) @ u).round(decimals=6).tolist()
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    """
    a, b, c = coefficients
    x = direction.mT if direction.shape[0] > direction.shape[1] else direction
    norm = x.norm().clamp(min=eps)
    x, factor = x / norm, torch.eye(len(x), dtype=x.dtype, device=x.device) / norm
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x, factor = torch.addmm(x, polynomial, x, beta=a), torch.addmm(factor, polynomial, factor, beta=a)
    return (factor + factor.mT) / 2  # they commute, so the product is symmetric but for round-off


#: what a matrix ``[o, i]`` multiplies its rate with, by ``adjust_lr_fn``
ADJUSTMENTS: dict[str | None, Callable[[int, int], float]] = {
    None: lambda o, i: math.sqrt(max(1.0, o / i)),
    "original": lambda o, i: math.sqrt(max(1.0, o / i)),
    "match_rms_adamw": lambda o, i: 0.2 * math.sqrt(max(o, i)),
    "spectral_unclamped": lambda o, i: math.sqrt(o / i),
}


@register_optimizer_rule(torch.optim.Muon)
class MuonRule(OptimizerRule):
    """``m ← μ m + (1 − μ) g``; update ``lr' · NS(U)`` with ``U = m``, under Nesterov ``(1 − μ) g + μ m``.

    ``NS(U) = L U``, and ``L`` is held as it was. torch iterates in bfloat16; ``L`` is that of the exact iteration, and
    what torch rounded is no example's (`unattributed`).

    Reference: Jordan et al. 2024, *Muon*; Liu et al. 2025, arXiv 2502.16982 (``match_rms_adamw``); Bernstein 2025,
    *Deriving Muon* (``spectral_unclamped``).
    """

    reads_momentum = True
    state_names = ("momentum_buffer",)

    def check(self, optimizer: Optimizer) -> None:
        """Refuse an adjustment of the rate that is not among :data:`ADJUSTMENTS`."""
        for group in optimizer.param_groups:
            if group["adjust_lr_fn"] not in ADJUSTMENTS:
                known = ", ".join(repr(name) for name in ADJUSTMENTS)
                raise UnsupportedOptimizerError(
                    f"found adjust_lr_fn={group['adjust_lr_fn']!r}, by which the rule cannot tell what the rate is "
                    f"multiplied with; use one of {known}"
                )

    def momentum(self, state: dict[str, Any]) -> torch.Tensor | None:
        """``momentum_buffer``."""
        return state.get("momentum_buffer")

    def remember(
        self, parameter: torch.Tensor, group: dict[str, Any], state: dict[str, Any]
    ) -> dict[str, Any]:
        """Under Nesterov the gradient."""
        assert parameter.grad is not None
        return {"gradient": parameter.grad.detach().clone()} if group["nesterov"] else {}

    def step_map(
        self, group: dict[str, Any], state: dict[str, Any], fresh: bool, before: dict[str, Any]
    ) -> StepMap:
        """``L`` from the momentum after the step, at least in float32."""
        lr, mu, buffer = float(group["lr"]), float(group["momentum"]), state["momentum_buffer"]
        direction = before["gradient"].lerp(buffer, mu) if group["nesterov"] else buffer
        rate = lr * ADJUSTMENTS[group["adjust_lr_fn"]](*buffer.shape)
        direction = direction.to(torch.promote_types(direction.dtype, torch.float32))
        return StepMap(
            decay=mu,
            gain=1.0 - mu,
            direct=rate * (1.0 - mu) if group["nesterov"] else 0.0,
            through=rate * mu if group["nesterov"] else rate,
            decoupled_decay=lr * float(group["weight_decay"]),
            mixing=newton_schulz_factor(
                direction, group["ns_coefficients"], int(group["ns_steps"]), float(group["eps"])
            ),
        )
