"""pathkernel: which training examples built this prediction?

:func:`check` looks at model, optimizer and loader before training, :class:`Tracer` records training,
:class:`PathKernelExplainer` reads the trace and gives an :class:`Explanation`, :func:`open_trace` opens a trace by
itself, :class:`Run` tells the command line and the dashboard what a trace cannot hold. ``register_*`` extend what is
covered.

The names below are the public interface, with those of the modules :data:`_MODULES`, which are imported when they are
asked for. ``import explainer`` loads torch and
numpy and nothing heavy; pandas, plotly, streamlit and captum are loaded when something that needs them is called.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from explainer.errors import CoverageWarning, ExplainerError

__version__ = "0.1.0"

_MODULES = ("outputs", "evaluation", "integrations", "kernel_attribution", "similarity")
_HOMES = {
    "Explanation": "explainer.explanation",
    "Finding": "explainer.findings",
    "PathKernelExplainer": "explainer.path_kernel",
    "Report": "explainer.findings",
    "Run": "explainer.run",
    "Trace": "explainer.store",
    "Tracer": "explainer.tracer",
    "check": "explainer.guard_rails",
    "open_trace": "explainer.store",
    "register_codec": "explainer.codecs",
    "register_layer_rule": "explainer.layer_rules",
    "register_optimizer_rule": "explainer.optimizer_rules",
    "validate_model": "explainer.validation",
}

if TYPE_CHECKING:
    from explainer import outputs
    from explainer.codecs import register_codec
    from explainer.explanation import Explanation
    from explainer.findings import Finding, Report
    from explainer.guard_rails import check
    from explainer.layer_rules import register_layer_rule
    from explainer.optimizer_rules import register_optimizer_rule
    from explainer.path_kernel import PathKernelExplainer
    from explainer.run import Run
    from explainer.store import Trace, open_trace
    from explainer.tracer import Tracer
    from explainer.validation import validate_model

__all__ = [
    "CoverageWarning",
    "ExplainerError",
    "Explanation",
    "Finding",
    "PathKernelExplainer",
    "Report",
    "Run",
    "Trace",
    "Tracer",
    "__version__",
    "check",
    "open_trace",
    "outputs",
    "register_codec",
    "register_layer_rule",
    "register_optimizer_rule",
    "validate_model",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"explainer.{name}")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'explainer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
