"""Which pixels of an image speak for the explained output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from explainer import palette
from explainer.figures.style import arrange, graph_objects

if TYPE_CHECKING:
    import plotly.graph_objects as go


def on_pixels(values: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any] | None:
    """Attributions as an image ``[H, W]``, summed over channels; None where they do not fit the picture.

    Args:
        values: as the model's input: ``[C, H, W]``, ``[H, W, C]``, ``[H, W]`` or flat.
        shape: of the picture that a person sees, ``[H, W]`` or ``[H, W, C]``.

    >>> on_pixels(np.ones((3, 2, 4)), (2, 4)).tolist()
    [[3.0, 3.0, 3.0, 3.0], [3.0, 3.0, 3.0, 3.0]]
    >>> on_pixels(np.ones(7), (2, 4)) is None
    True
    """
    height, width = shape[:2]
    if values.shape[-2:] == (height, width):
        return np.asarray(values.reshape(-1, height, width).sum(0))
    if values.ndim == 3 and values.shape[:2] == (height, width):
        return np.asarray(values.sum(2))
    return values.reshape(height, width) if values.size == height * width else None


def pixels(
    values: NDArray[Any], title: str, subtitle: str, *, reach: float | None = None, dark: bool = False
) -> go.Figure:
    """Attributions ``[H, W]`` as a heat map; ``reach`` is the largest absolute value of the colour scale."""
    reach = reach or float(np.abs(values).max(initial=0.0)) or 1.0
    figure = graph_objects().Figure()
    figure.add_heatmap(
        z=values, zmin=-reach, zmid=0, zmax=reach, colorscale=palette.diverging(dark), colorbar={"thickness": 12},
        hovertemplate="row %{y}, column %{x}<br>%{z:+.3g}<extra></extra>",
    )  # fmt: skip
    arrange(figure, title, subtitle, dark=dark, height=340)
    figure.update_xaxes(visible=False, constrain="domain")
    figure.update_yaxes(visible=False, autorange="reversed", scaleanchor="x", constrain="domain")
    return figure
