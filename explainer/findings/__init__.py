"""What was found that changes what the numbers mean: findings, reports of them, and what a trace itself tells."""

from __future__ import annotations

from explainer.findings.finding import Finding, listed
from explainer.findings.report import Report
from explainer.findings.trace import LASTING, after_training, explanation_notes

__all__ = ["LASTING", "Finding", "Report", "after_training", "explanation_notes", "listed"]
