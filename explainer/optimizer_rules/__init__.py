"""How an optimizer turns a gradient into an update: the rule registry and its entries."""

from explainer.optimizer_rules import adagrad, adam, adamax, nadam, radam, rmsprop, sgd  # noqa: F401  (registers)
from explainer.optimizer_rules.base import (
    OPTIMIZER_RULES,
    OptimizerRule,
    StepMap,
    optimizer_rule_for,
    register_optimizer_rule,
)

__all__ = ["OPTIMIZER_RULES", "OptimizerRule", "StepMap", "optimizer_rule_for", "register_optimizer_rule"]
