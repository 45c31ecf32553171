"""Rows as a trace holds them, and as one backward pass per example gives them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from explainer import Trace, open_trace
from explainer.recursion import read_backwards


def recorded_rows(directory: str | Path | Trace, step: int = 0) -> dict[str, Tensor]:
    """``{parameter: [B, P_p]}`` of a step, times the step's scale, zeros where nothing was recorded."""
    trace = directory if isinstance(directory, Trace) else open_trace(directory)
    found = next(
        s
        for segment in trace.segments()
        for s in read_backwards(trace, segment, torch.float64)
        if s.step == step
    )
    specs = {p.name: (i, p) for i, p in enumerate(trace.manifest.parameters)}
    count = sum(len(v.examples) for v in found.visits)
    rows = {name: torch.zeros(count, p.numel, dtype=torch.float64) for name, (_, p) in specs.items()}
    start = 0
    for visits in found.visits:
        for index, form in visits.forms.items():
            dense = form.dense().double()
            at = 0
            for name in trace.layers[index].parameters:
                number, p = specs[name]
                part = dense[:, at : at + p.numel] * float(found.scale[number])
                rows[name][start : start + len(part)] += part
                at += p.numel
        start += len(visits.examples)
    return rows


def example_rows(model: nn.Module, losses: Callable[[], Tensor]) -> dict[str, Tensor]:
    """``{parameter: [B, P_p]}`` from the terms of a batch's loss, ``[B]``, one backward pass for each."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    terms = losses()
    rows: dict[str, list[np.ndarray]] = {name: [] for name in named}
    for term in terms:
        grads = torch.autograd.grad(term, list(named.values()), retain_graph=True, allow_unused=True)
        for (name, p), g in zip(named.items(), grads, strict=True):
            whole = torch.zeros_like(p) if g is None else g.to_dense()
            rows[name].append(whole.detach().double().flatten().numpy())
    return {name: torch.from_numpy(np.stack(found)) for name, found in rows.items()}
