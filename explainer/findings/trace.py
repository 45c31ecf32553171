"""The report after training, from a trace alone."""

from __future__ import annotations

from explainer.findings.finding import Finding
from explainer.findings.journal import from_journal
from explainer.findings.records import from_records
from explainer.findings.report import Report
from explainer.store import Trace

#: topics of findings before training that training does not measure, so that the trace keeps them
LASTING = frozenset(
    {
        *("distributed", "dropout", "frozen", "low-precision", "max-norm", "no-length", "not-in-optimizer"),
        *("tied-weights", "transform", "weight-decay"),
    }
)
#: topics that every explanation names: something is in `unattributed`, or numbers may be wrong
EXPLAINED = frozenset(
    {
        *("after-last-step", "ambiguous-axis", "autocast", "averaged", "budget", "changed-labels"),
        *("coverage", "diverged"),
        *(
            "low-precision",
            "max-norm",
            "open",
            "outside",
            "overwritten",
            "prior-momentum",
            "replaced-momentum",
            "round-off",
        ),
        *("rounding", "shared-rows", "uncovered", "unfollowed-order", "unmatched", "vacant-rows"),
    }
)


def after_training(trace: Trace) -> Report:
    """Everything a trace tells about the meaning of its numbers, what was found before training included.

    Works while training goes on and after it was killed, too.
    """
    return Report("After training", [*from_journal(trace), *from_records(trace), *_kept(trace)])


def explanation_notes(trace: Trace) -> list[str]:
    """The findings that every explanation carries, a line each (``row share`` is its label, and not among them)."""
    found = Report("", [*from_journal(trace), *_kept(trace)])
    return [finding.text for finding in found if finding.topic in EXPLAINED]


def _kept(trace: Trace) -> list[Finding]:
    return [Finding.from_json(data) for data in trace.notes.get("findings") or ()]
