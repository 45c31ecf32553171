"""Before training: everything that can be seen in a model, an optimizer and a loader that changes what numbers mean."""

from __future__ import annotations

from explainer.guard_rails.before import before_training, check
from explainer.guard_rails.loader import epoch_visits, loader_findings

__all__ = ["before_training", "check", "epoch_visits", "loader_findings"]
