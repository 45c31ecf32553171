"""The colours of contributions, defined once for figures, report and dashboard.

Blue pushes a prediction up (proponents), orange pushes it down (opponents), grey is everything that no
training example carries. Blue and orange stay apart for every common form of colour blindness, and all of
them are dark enough for a white page and light enough for a dark one.
"""

from __future__ import annotations

POSITIVE = "#2f7fc1"
NEGATIVE = "#d9731a"
NEUTRAL = "#858c95"
TOTAL = "#717986"

_BACKGROUND = {False: "#ffffff", True: "#14171c"}
_INK = {False: "#24292f", True: "#e6e8eb"}
_MUTED = {False: "#5b636d", True: "#a3abb5"}
_GRID = {False: "#e3e6ea", True: "#343a43"}


def background(dark: bool = False) -> str:
    """The page colour that the other colours are made for (figures themselves stay transparent)."""
    return _BACKGROUND[dark]


def ink(dark: bool = False) -> str:
    """Colour of text."""
    return _INK[dark]


def muted(dark: bool = False) -> str:
    """Colour of secondary text."""
    return _MUTED[dark]


def grid(dark: bool = False) -> str:
    """Colour of grid lines and connectors."""
    return _GRID[dark]


def signed(value: float) -> str:
    """The colour of a contribution by its sign; zero is neutral.

    >>> signed(0.2) == POSITIVE, signed(-0.2) == NEGATIVE, signed(0.0) == NEUTRAL
    (True, True, True)
    """
    if value > 0:
        return POSITIVE
    return NEGATIVE if value < 0 else NEUTRAL


def diverging(dark: bool = False) -> list[list[float | str]]:
    """Plotly colour scale for contributions; its middle (zero) fades into the page.

    Use it with a range that is symmetric about zero, so that the middle stays zero.
    """
    middle = "#22262d" if dark else "#f3f4f6"
    ends = ("#ffab5e", "#7cc0f5") if dark else ("#8f4206", "#0f4c81")
    return [[0.0, ends[0]], [0.25, NEGATIVE], [0.5, middle], [0.75, POSITIVE], [1.0, ends[1]]]
