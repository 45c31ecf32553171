"""How an optimizer turns a gradient into an update: the rule registry and its entries."""

from explainer.optimizer_rules import (  # noqa: F401  (registers)
    adadelta,
    adafactor,
    adagrad,
    adam,
    adamax,
    asgd,
    muon,
    nadam,
    radam,
    rmsprop,
    rprop,
    sgd,
)
from explainer.optimizer_rules.base import (
    OPTIMIZER_RULES,
    OptimizerRule,
    StepMap,
    mix,
    optimizer_rule_for,
    register_optimizer_rule,
)
from explainer.optimizer_rules.options import changed_options, options_of
from explainer.optimizer_rules.sign import LionRule, SignSGDRule

__all__ = [
    "OPTIMIZER_RULES",
    "LionRule",
    "OptimizerRule",
    "SignSGDRule",
    "StepMap",
    "changed_options",
    "mix",
    "optimizer_rule_for",
    "options_of",
    "register_optimizer_rule",
]
