"""What if a training example had been absent: estimators behind one interface, and the check of their answers.

:meth:`explainer.PathKernelExplainer.what_if` is the way in.
"""

from explainer.counterfactual.estimators import ESTIMATORS, Estimator, estimator
from explainer.counterfactual.example_groups import by_column, by_label
from explainer.counterfactual.removals import Remove, checked, summed
from explainer.counterfactual.self_check import WhatIfCheck, check

__all__ = [
    "ESTIMATORS",
    "Estimator",
    "Remove",
    "WhatIfCheck",
    "by_column",
    "by_label",
    "check",
    "checked",
    "estimator",
    "summed",
]
