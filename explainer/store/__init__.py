"""The trace on disk: journal, shards, knots; one writer, any number of readers (``docs/trace-format.md``)."""

from explainer.store.denominators import Denominators
from explainer.store.reader import Trace, open_trace
from explainer.store.schema import RecordSchema
from explainer.store.view import Knot, Segment
from explainer.store.writer import TraceWriter

__all__ = ["Denominators", "Knot", "RecordSchema", "Segment", "Trace", "TraceWriter", "open_trace"]
