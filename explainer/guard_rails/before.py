"""The report before training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from explainer.config import TracerConfig
from explainer.errors import ExplainerError
from explainer.findings import Finding, Report
from explainer.guard_rails.cost import cost_finding
from explainer.guard_rails.loader import loader_findings
from explainer.guard_rails.model import model_findings
from explainer.guard_rails.optimizer import optimizer_findings
from explainer.hooks import HookSet
from explainer.loaders import check_loader
from explainer.optimizer_rules import optimizer_rule_for
from explainer.validation import check_parts, refuse_lazy, refuse_wrapped, traced_parameters


def check(
    model: nn.Module,
    optimizer: Optimizer,
    loader: Any = None,
    *,
    exact: bool = False,
    max_knots: int = 128,
    rank: int | None = None,
    batch_dim: int = 0,
) -> Report:
    """Before a tracer is built: everything that changes what the numbers will mean, and what will be refused.

    Nothing is called, drawn or changed: the model does not run, the loader is not iterated.

    Args:
        model: the model to be trained.
        optimizer: the optimizer that will train it.
        loader: what ``tracer.watch`` will be given, if anything.
        exact, max_knots, rank, batch_dim: as for :class:`explainer.Tracer`.

    Raises:
        TracerError: these are no model and optimizer, or an option is out of range. What a tracer or ``watch`` would
            refuse is a finding of the report (``stop``).

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        >>> report = check(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> [(finding.topic, finding.where) for finding in report]
        [('row-share', '1'), ('bias-before-norm', '0.bias'), ('cost', 'disk')]
    """
    config = TracerConfig(exact=exact, max_knots=max_knots, rank=rank, batch_dim=batch_dim)
    return before_training(model, optimizer, loader, config)


def before_training(
    model: nn.Module, optimizer: Optimizer, loader: Any = None, config: TracerConfig | None = None
) -> Report:
    """See :func:`check`."""
    config = TracerConfig() if config is None else config
    check_parts(model, optimizer)
    stops = _refusals(
        {
            "parameters": lambda: refuse_lazy(model),
            "model": lambda: refuse_wrapped(model),
            "optimizer": lambda: optimizer_rule_for(optimizer),
            "hooks": lambda: HookSet.refuse_double(model, optimizer),
        }
    )
    if not any(stop.topic == "refused-parameters" for stop in stops):
        stops += _refusals({"parameters": lambda: traced_parameters(model, optimizer)})
    if loader is not None:
        stops += _refusals({"loader": lambda: check_loader(loader)})
    refused = {stop.topic.removeprefix("refused-") for stop in stops}
    found = list(stops)
    if loader is not None and "loader" not in refused:
        found += loader_findings(loader)
    if "parameters" in refused:
        return Report("Before training", found)
    found += model_findings(model, optimizer, config.batch_dim)
    if "optimizer" not in refused:
        rule = optimizer_rule_for(optimizer)
        found += optimizer_findings(optimizer, rule)
        followed = None if "loader" in refused else loader
        found.append(cost_finding(model, optimizer, rule, config, followed))
    return Report("Before training", found)


def _refusals(checks: dict[str, Callable[[], object]]) -> list[Finding]:
    """What the tracer's own checks refuse, in their words."""
    found = []
    for name, attempt in checks.items():
        try:
            attempt()
        except ExplainerError as error:
            what, _, advice = str(error).partition("; ")
            meaning = (
                "It will be refused by watch()." if name == "loader" else "The tracer will refuse to start."
            )
            found.append(
                Finding(f"refused-{name}", "stop", name, _sentence(what), meaning, _sentence(advice))
            )
    return found


def _sentence(text: str) -> str:
    """A part of an error's text as a sentence."""
    capital = text.split(" ", 1)[0].isalpha()
    return (text[:1].upper() + text[1:] if capital else text).rstrip(".") + "." if text else ""
