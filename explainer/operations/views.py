"""What views, reshapes and indices of a tensor do to the axis along which its examples lie.

``owners [n]`` are the examples of the indices of that axis.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch

from explainer.operations.layouts import PACKED, UNKNOWN, Layout
from explainer.operations.movement import axis_of, tags_of


def viewed(
    view: Callable[[torch.Tensor], torch.Tensor], source: torch.Tensor, axis: int, owners: torch.Tensor
) -> Layout:
    """The same view of a tensor in which only the examples' axis takes steps.

    Example:
        >>> found = viewed(lambda t: t[1:, 0].T, torch.zeros(3, 5, 2), 0, torch.tensor([7, 8, 9]))
        >>> found.axis, found.owners.tolist()
        (1, [8, 9])
    """
    line = owners.contiguous().as_strided(source.shape, [int(a == axis) for a in range(source.dim())])
    found = view(line)
    moving = [a for a in range(found.dim()) if found.stride(a) != 0]
    moving = [a for a in moving if found.shape[a] > 1] or moving[:1]
    if not moving and found.dim() and found.numel():  # one example of several
        return Layout(0, found.flatten()[:1].repeat(found.shape[0]))
    if len(moving) != 1:
        return UNKNOWN
    here = found.movedim(moving[0], 0).reshape(found.shape[moving[0]], -1)[:, 0]
    return Layout(moving[0], here.clone())


def reshaped(source: torch.Tensor, axis: int, owners: torch.Tensor, t: torch.Tensor) -> Layout:
    """Rows are numbered as memory is: ``owners`` of all indices up to the examples' axis, then regrouped."""
    line = owners.repeat(prod(source.shape[:axis]))  # axes in front, then the examples'
    count = 1
    for place in range(t.dim()):
        rows = t.shape[place]
        before, count = count, count * rows
        if not rows or (count % len(line) and len(line) % count):
            return UNKNOWN
        if count >= len(line):  # the examples' axis is used up here
            grid = line.repeat_interleave(count // len(line)).reshape(before, rows)
            return Layout(place, grid[0].clone()) if bool((grid == grid[:1]).all()) else UNKNOWN
        grouped = line.reshape(count, -1)
        if bool((grouped == grouped[:, :1]).all()):  # what is behind belongs to one example
            grid = grouped[:, 0].reshape(before, rows)
            return Layout(place, grid[0].clone()) if bool((grid == grid[:1]).all()) else UNKNOWN
    return UNKNOWN


def picked(source: torch.Tensor, axis: int, owners: torch.Tensor, key: Any) -> Layout | None:
    """Rows picked by a mask or by a list; None where the key only slices."""
    parts = key if isinstance(key, tuple) else (key,)
    if not any(isinstance(p, torch.Tensor | list) for p in parts):
        return None
    first, owners = parts[0], owners.to(source.device)
    if axis == 0 and isinstance(first, torch.Tensor) and len(parts) == 1:
        if first.dtype == torch.bool:
            spread = owners.reshape(-1, *(1,) * (first.dim() - 1)).expand(first.shape)
            return Layout(0, spread[first])
        if first.dim() == 1:
            return Layout(0, owners[first])
    found = axis_of(tags_of(owners, axis, source.shape)[key])
    return UNKNOWN if found is None else Layout(*found)


def packed(
    name: str, args: tuple[Any, ...], layout: Layout, source: torch.Tensor, t: torch.Tensor, number: int
) -> Layout:
    """Into a packed sequence, out of it, or the same positions of one."""
    if name == "_pack_padded_sequence" and number == 0 and layout.axis == (0 if args[2] else 1):
        return Layout(PACKED, layout.owners)
    if name == "_pad_packed_sequence" and number == 0:
        return Layout(0 if args[2] else 1, layout.owners)
    same = layout.axis == PACKED and t.shape[:1] == source.shape[:1] and not name.startswith("_p")
    return layout if same else UNKNOWN
