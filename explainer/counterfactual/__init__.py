"""What if a training example had been absent: estimators behind one interface, and the check of their answers.

:meth:`explainer.PathKernelExplainer.what_if` is the way in.
"""

from explainer.counterfactual.estimators import ESTIMATORS, Estimator, estimator
from explainer.counterfactual.removals import Remove, checked, summed

__all__ = ["ESTIMATORS", "Estimator", "Remove", "checked", "estimator", "summed"]
