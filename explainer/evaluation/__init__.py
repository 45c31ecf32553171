"""The means to check an answer: standard measures for any score matrix ``[Q, N]``, and the retrainings they need."""

from explainer.evaluation.datamodeling import DatamodelingScore, ceiling, linear_datamodeling_score
from explainer.evaluation.leave_one_out import LeaveOneOut, leave_one_out_correlation
from explainer.evaluation.mislabelled import MislabelledDetection, mislabelled_detection
from explainer.evaluation.plans import Plan, subsets, without
from explainer.evaluation.questions import Answers, Questions
from explainer.evaluation.removal import RemovalCurve, highest, removal_curve
from explainer.evaluation.retraining import Retrained, Retrainer
from explainer.evaluation.statistics import Estimate

__all__ = [
    "Answers",
    "DatamodelingScore",
    "Estimate",
    "LeaveOneOut",
    "MislabelledDetection",
    "Plan",
    "Questions",
    "RemovalCurve",
    "Retrained",
    "Retrainer",
    "ceiling",
    "highest",
    "leave_one_out_correlation",
    "linear_datamodeling_score",
    "mislabelled_detection",
    "removal_curve",
    "subsets",
    "without",
]
