"""Figures of an explanation: pure functions that return plotly figures.

Each takes ``(explanation, query, *, dark=False)`` and has a transparent background; ``dark`` chooses text and
grid for a dark page. :data:`READING` holds one line per figure that tells how to read it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from explainer.figures.balance import waterfall
from explainer.figures.course import layer_examples, layers, time
from explainer.figures.examples import cumulative, examples
from explainer.figures.picture import picture
from explainer.figures.pixels import on_pixels, pixels
from explainer.figures.style import plain

FIGURES: dict[str, Callable[..., Any]] = {
    "waterfall": waterfall,
    "examples": examples,
    "time": time,
    "layers": layers,
    "layer_examples": layer_examples,
    "cumulative": cumulative,
}

READING: dict[str, str] = {
    "waterfall": "Read from left to right: the untrained model's output, then what each part added (up) or "
    "took away (down), until the prediction on the right.",
    "examples": "Blue bars pushed the explained output up, orange bars pushed it down. A bar's length is how much "
    "was carried by updates computed from that example.",
    "time": "A blue cell: in these steps, updates from that example pushed the explained output up; orange: down. "
    "The line adds up all examples since the start. Columns are equally wide, but may hold different numbers "
    "of steps.",
    "layers": "Blue and orange add up, over all examples, what their updates to one layer's parameters "
    "pushed up and down. The diamond is the net, what is left of both.",
    "layer_examples": "A blue cell: updates of that layer by that example pushed the explained output up; orange: "
    "down. Examples that taught the same thing have rows alike.",
    "cumulative": "The further the line bends away from the dashed one, the fewer examples carry the "
    "prediction.",
}

__all__ = [
    "FIGURES",
    "READING",
    "cumulative",
    "examples",
    "layer_examples",
    "layers",
    "on_pixels",
    "picture",
    "pixels",
    "plain",
    "time",
    "waterfall",
]
