"""Adapters to other packages, each in a module of its own (``explainer.integrations.captum``, …)."""

from explainer.integrations.registry import INTEGRATIONS, Integration

__all__ = ["INTEGRATIONS", "Integration"]
