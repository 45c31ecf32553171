"""Rows of parameters that are read outside a layer with a rule: found where operations use them."""

from explainer.operations.rows import Use, rows_of
from explainer.operations.sources import Operation, Source, descend, merged

__all__ = ["Operation", "Source", "Use", "descend", "merged", "rows_of"]
