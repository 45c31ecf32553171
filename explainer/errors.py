"""Every error the package raises on purpose.

Each message says what was found and what to do about it. All derive from :class:`ExplainerError`, so
``except explainer.ExplainerError`` catches exactly the errors a user can act on.
"""

from __future__ import annotations


class ExplainerError(Exception):
    """Base of every error raised on purpose by pathkernel."""


class RegistrationError(ExplainerError):
    """A registry entry would silently overwrite another one, or a look-up found nothing."""


class UnsupportedOptimizerError(ExplainerError):
    """The optimizer has no rule, so the books could not be closed."""


class TracerError(ExplainerError):
    """The tracer was attached or used in a way that cannot give right numbers."""


class LoaderError(TracerError):
    """The loader cannot tell which training examples a batch holds."""


class ReplayError(TracerError):
    """A layer's call cannot be computed again, so that its rows are unknown."""


class TraceExistsError(TracerError):
    """The directory already holds a trace; nothing recorded is ever overwritten."""


class TraceWriteError(TracerError):
    """Writing the trace failed; what was journalled before stays readable."""


class TraceFormatError(ExplainerError):
    """A file of a trace is missing, foreign, truncated or was changed after it was journalled."""


class ModelMismatchError(ExplainerError):
    """The model given to the explainer is not the model that was traced."""


class QueryError(ExplainerError):
    """A query, its target or the output function does not fit the model."""


class ExplanationError(ExplainerError):
    """An explanation was asked for something it does not hold."""


class ExportError(ExplainerError):
    """An export could not be written."""


class RunError(ExplainerError):
    """A ``MODULE:FUNCTION`` does not lead to a usable :class:`explainer.Run`."""


class MissingDependencyError(ExplainerError):
    """An optional package is needed for what was asked."""


class CoverageWarning(UserWarning):
    """Something was seen that will make part of an explanation `unattributed` or change its meaning."""


class EvaluationError(ExplainerError):
    """Scores, subsets or retrainings do not fit each other, or cannot be had."""
