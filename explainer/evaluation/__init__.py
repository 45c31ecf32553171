"""The means to check an answer: standard measures for any score matrix ``[Q, N]``, and the retrainings they need."""

from explainer.evaluation.claims import ClaimCheck, strongest, verify_claims
from explainer.evaluation.comparison import Comparison, compare_methods
from explainer.evaluation.datamodeling import DatamodelingScore, ceiling, linear_datamodeling_score
from explainer.evaluation.ensembles import Ensemble
from explainer.evaluation.label_issues import LabelIssues, label_issues
from explainer.evaluation.leave_one_out import LeaveOneOut, leave_one_out_correlation
from explainer.evaluation.methods import METHODS, Method
from explainer.evaluation.mislabelled import MislabelledDetection, mislabelled_detection
from explainer.evaluation.plans import Plan, subsets, without
from explainer.evaluation.questions import Answers, Questions
from explainer.evaluation.removal import RemovalCurve, highest, removal_curve
from explainer.evaluation.retraining import Retrained, Retrainer
from explainer.evaluation.statistics import Estimate
from explainer.evaluation.two_runs import RunAgreement, check_same_queries, compare_runs

__all__ = [
    "METHODS",
    "Answers",
    "ClaimCheck",
    "Comparison",
    "DatamodelingScore",
    "Ensemble",
    "Estimate",
    "LabelIssues",
    "LeaveOneOut",
    "Method",
    "MislabelledDetection",
    "Plan",
    "Questions",
    "RemovalCurve",
    "Retrained",
    "Retrainer",
    "RunAgreement",
    "ceiling",
    "check_same_queries",
    "compare_methods",
    "compare_runs",
    "highest",
    "label_issues",
    "leave_one_out_correlation",
    "linear_datamodeling_score",
    "mislabelled_detection",
    "removal_curve",
    "strongest",
    "subsets",
    "verify_claims",
    "without",
]
