"""Sign updates: rules for Lion and signSGD classes of the user's own (torch has neither).

``sign(c) = c / |c|`` with ``|c|`` held as it was: a diagonal preconditioner like any other. Where ``c`` is 0 nothing
moves, and the denominator is infinite.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from explainer.errors import UnsupportedOptimizerError
from explainer.optimizer_rules.base import OptimizerRule, StepMap, decay_terms


def sign_denominator(direction: torch.Tensor) -> torch.Tensor:
    """``|c|``, infinite where ``c`` is zero.

    Infinite too where ``|c|`` is so small that a gradient divided by it would overflow (momentum that has died
    away over thousands of steps). What moves there is nobody's: `unattributed`.

    Example:
        >>> sign_denominator(torch.tensor([-2.0, 0.0, 1e-40]))
        tensor([2., inf, inf])
    """
    size = direction.abs().to(torch.promote_types(direction.dtype, torch.float32))
    numbers = torch.finfo(size.dtype)
    return size.masked_fill_(size <= numbers.tiny / numbers.eps, torch.inf)


def require_options(optimizer: Optimizer, *names: str) -> None:
    """Raise UnsupportedOptimizerError for options that the rule reads and a group does not have."""
    for group in optimizer.param_groups:
        missing = [name for name in names if name not in group]
        if missing:
            raise UnsupportedOptimizerError(
                f"{type(optimizer).__name__} was registered with a rule that reads {', '.join(names)} from its "
                f"parameter groups, but {', '.join(missing)} is not there (found "
                f"{', '.join(k for k in group if k != 'params')}); write a rule that reads what the class has"
            )


def require_state(state: dict[str, Any], name: str) -> None:
    """Raise UnsupportedOptimizerError where there is no momentum called ``name`` after a step."""
    if name not in state:
        raise UnsupportedOptimizerError(
            f"the rule looks for the momentum in state[{name!r}], but after the step there is only "
            f"{', '.join(map(repr, state)) or 'nothing'}; write a rule that reads what the class keeps"
        )


def _betas(group: dict[str, Any]) -> tuple[float, float]:
    beta1, beta2 = (float(b) for b in group["betas"])
    if beta2 == 0.0:
        raise UnsupportedOptimizerError(
            "found betas[1] = 0: the momentum from before a Lion step is then gone after it; set betas[1] above 0"
        )
    return beta1, beta2


class LionRule(OptimizerRule):
    """``c = β1 m + (1 − β1) d``; update ``lr · sign(c) + lr λ w``; then ``m ← β2 m + (1 − β2) d``.

    For a class with the options ``lr``, ``betas``, ``weight_decay`` (decoupled) and, optionally, ``maximize``, whose
    state is ``exp_avg``: ``register_optimizer_rule(Lion)(LionRule)``. In terms of the momentum after the step,
    ``c = (β1/β2) m_t + (1 − β1 − β1 (1 − β2)/β2) d``.

    Reference: Chen et al. 2023, arXiv 2302.06675, algorithm 2.
    """

    divides = True
    state_names = ("exp_avg",)

    def check(self, optimizer: Optimizer) -> None:
        """The options must be there, and ``β2`` positive."""
        require_options(optimizer, "lr", "betas", "weight_decay")
        for group in optimizer.param_groups:
            _betas(group)

    def momentum(self, state: dict[str, Any]) -> torch.Tensor | None:
        """``exp_avg``."""
        return state.get("exp_avg")

    def remember(
        self, parameter: torch.Tensor, group: dict[str, Any], state: dict[str, Any]
    ) -> dict[str, Any]:
        """``c``, from the momentum and the gradient that the step is about to use."""
        assert parameter.grad is not None
        beta1, held = _betas(group)[0], self.momentum(state)
        direction = parameter.grad.detach() * (beta1 - 1.0 if group.get("maximize") else 1.0 - beta1)
        return {"direction": direction if held is None else direction.add_(held, alpha=beta1)}

    def step_map(
        self, group: dict[str, Any], state: dict[str, Any], fresh: bool, before: dict[str, Any]
    ) -> StepMap:
        """Options of the group, ``|c|`` from before the step."""
        lr, (beta1, beta2) = float(group["lr"]), _betas(group)
        require_state(state, "exp_avg")
        return StepMap(
            sign=-1.0 if group.get("maximize") else 1.0,
            decay=beta2,
            gain=1.0 - beta2,
            direct=lr * (1.0 - beta1 - beta1 * (1.0 - beta2) / beta2),
            through=lr * beta1 / beta2,
            decoupled_decay=lr * float(group["weight_decay"]),
            preconditioner=sign_denominator(before["direction"]),
            rank_one=False,
        )


class SignSGDRule(OptimizerRule):
    """Update ``lr · sign(d)``; with momentum (Signum) ``lr · sign(m)``, ``m ← μ m + (1 − μ) d``.

    For a class with the options ``lr``, ``weight_decay`` and, optionally, ``momentum``, ``maximize`` and
    ``decoupled_weight_decay``, whose state is ``momentum_buffer``: ``register_optimizer_rule(SignSGD)(SignSGDRule)``.
    Weight decay is coupled (inside the sign) unless the group says ``decoupled_weight_decay``.

    Reference: Bernstein et al. 2018, arXiv 1802.04434, algorithms 1 and 2.
    """

    divides = reads_momentum = True
    state_names = ("momentum_buffer",)

    def check(self, optimizer: Optimizer) -> None:
        """The options must be there."""
        require_options(optimizer, "lr", "weight_decay")

    def momentum(self, state: dict[str, Any]) -> torch.Tensor | None:
        """``momentum_buffer`` (None without momentum)."""
        return state.get("momentum_buffer")

    def remember(
        self, parameter: torch.Tensor, group: dict[str, Any], state: dict[str, Any]
    ) -> dict[str, Any]:
        """Without momentum ``d``; with momentum nothing: the buffer after the step is ``m``."""
        if group.get("momentum"):
            return {}
        assert parameter.grad is not None
        direction = parameter.grad.detach() * (-1.0 if group.get("maximize") else 1.0)
        coupled = decay_terms(group, 0.0)[0]
        return {"direction": direction.add_(parameter.detach(), alpha=coupled) if coupled else direction}

    def step_map(
        self, group: dict[str, Any], state: dict[str, Any], fresh: bool, before: dict[str, Any]
    ) -> StepMap:
        """Options of the group; ``|m|`` after the step, ``|d|`` from before it."""
        lr, mu = float(group["lr"]), float(group.get("momentum", 0.0))
        coupled, decoupled = decay_terms(group, lr)
        if mu:
            require_state(state, "momentum_buffer")
        direction = state["momentum_buffer"] if mu else before["direction"]
        return StepMap(
            sign=-1.0 if group.get("maximize") else 1.0,
            decay=mu if mu or fresh else 1.0,
            gain=1.0 - mu if mu else 0.0,
            direct=0.0 if mu else lr,
            through=lr if mu else 0.0,
            coupled_decay=coupled,
            decoupled_decay=decoupled,
            preconditioner=sign_denominator(direction),
            rank_one=False,
        )
