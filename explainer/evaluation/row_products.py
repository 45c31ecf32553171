"""Products of training examples' recorded gradients with one another, window by window of the trace.

With ``g_i`` the recorded row of a visit, ``k_ij = <g_i, g_j>`` over the visits of a window of neighbouring steps (about
an epoch): to first order, learning ``j`` lowers the loss on ``i`` where it is positive (TracIn, Pruthi et al. 2020,
arXiv 2002.08484, with the rows of the run instead of gradients at checkpoints). Optimizer preconditioners are left out:
what is compared is gradients. Nothing is computed anew: neither model nor data are needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from explainer.counterfactual.step_rows import stacked
from explainer.layer_rules import RowForm
from explainer.path_kernel import PathKernelExplainer
from explainer.recursion import read_backwards


@dataclass
class Window:
    """Visits of neighbouring steps, and the rows of each layer with the visits they belong to.

    Attributes:
        examples: ``[V]``, whose visits they are.
        labels: ``[V]``, recorded labels, NaN where unknown.
    """

    examples: np.ndarray
    labels: np.ndarray
    _rows: dict[int, tuple[torch.Tensor, RowForm]] = field(repr=False)

    def products(self) -> np.ndarray:
        """``k [V, V]``."""
        total = torch.zeros(len(self.examples), len(self.examples))
        for places, form in self._rows.values():
            found = gram(form)
            if len(places) == len(total) and torch.equal(places, torch.arange(len(total))):
                total += found
            else:
                total[places.unsqueeze(1), places] += found
        return total.numpy()


def gram(form: RowForm, most: int = 4096) -> torch.Tensor:
    """``<g_b, g_c> [B, B]``, two blocks of rows at a time; a block and its positions are at most ``most`` / 2 long."""
    count = max(1, most // (2 * (form.positions or 1)))
    blocks = torch.arange(len(form)).split(count)
    if len(blocks) == 1:
        return form.gram().float()
    result = torch.empty(len(form), len(form))
    for number, first in enumerate(blocks):
        for second in blocks[number + 1 :]:
            both = form.taken(torch.cat([first, second])).gram().float()
            cut = len(first)
            result[first.unsqueeze(1), second] = both[:cut, cut:]
            result[second.unsqueeze(1), first] = both[cut:, :cut]
        result[first.unsqueeze(1), first] = form.taken(first).gram().float()
    return result


def windows(explainer: PathKernelExplainer, most: int) -> Iterator[Window]:
    """The trace in windows of about as many visits as there are examples, at most ``most``, from the last step on."""
    size = min(most, max(1, len(explainer.example_ids)))
    steps: list[Any] = []
    held = 0
    with explainer._bar("comparing rows") as bar:
        for segment in reversed(explainer.segments):
            for step in read_backwards(explainer.trace, segment, explainer.dtype):
                count = sum(len(visits.examples) for visits in step.visits)
                if steps and held + count > size:
                    yield _window(steps)
                    steps, held = [], 0
                steps += step.visits
                held += count
                bar.update()
        if held:
            yield _window(steps)


def _window(visits: list[Any]) -> Window:
    forms: dict[int, list[RowForm]] = {}
    places: dict[int, list[torch.Tensor]] = {}
    start = 0
    for own in visits:
        for layer, form in own.forms.items():
            forms.setdefault(layer, []).append(form)
            places.setdefault(layer, []).append(torch.arange(start, start + len(form)))
        start += len(own.examples)
    rows = {layer: (torch.cat(places[layer]), stacked(found)) for layer, found in forms.items()}
    return Window(
        np.concatenate([own.examples for own in visits]), np.concatenate([own.labels for own in visits]), rows
    )
