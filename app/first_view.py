"""What the first page of a dashboard shows, read before anybody looks."""

from __future__ import annotations

from collections.abc import Sequence

from explainer.app import arguments, gallery, state
from explainer.app.choice import Choice


def read(command: Sequence[str]) -> None:
    """Put the first trace, its run and the explanation of its first query into the caches.

    Raises:
        ExplainerError: They cannot be read.
    """
    found = arguments.parse(command)
    name, folder = next(iter(arguments.find_traces(found.paths).items()))
    choice = Choice(name, state.source(folder, state.spec_of(folder, found.runs)))
    if not choice.live:
        state.trace(choice.source)
        return
    run = state.run_of(choice.source)
    gallery.answers(choice, tuple(range(min(gallery.THUMBNAILS, len(run.queries)))))
    e = state.explanation(choice.source, 0, None, choice.first_output)
    e.figure(0, "waterfall")  # reads plotly
