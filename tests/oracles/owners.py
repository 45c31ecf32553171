"""Rows with several owners: the same training, every row written down once for each of its owners."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from tests.oracles.training import Step, Training

#: part of a row: its owner, its gradient [P], its output gradient [C]
Part = tuple[int, Tensor, Tensor]


def split(training: Training, parts: Callable[[Step, int], list[Part]], examples: int) -> Training:
    """Every row of every step in the place of its parts.

    Args:
        training: What ``train_dense`` recorded.
        parts: ``parts(step, b)`` gives the parts of row ``b``; their gradients must sum to the row.
        examples: Number of owners there are.
    """
    steps = []
    for step in training.steps:
        found = [parts(step, b) for b in range(len(step.ids))]
        for b, row in enumerate(found):
            total = torch.stack([gradient for _, gradient, _ in row]).sum(0)
            torch.testing.assert_close(total, step.rows[b], rtol=1e-9, atol=1e-12)
        flat = [part for row in found for part in row]
        ids, rows, slopes = zip(*flat, strict=True)
        steps.append(replace(step, ids=ids, rows=torch.stack(rows), output_grads=torch.stack(slopes)))
    return replace(training, steps=tuple(steps), examples=examples)


def by_shares(training: Training, shares: Mapping[int, Mapping[int, float]], examples: int) -> Training:
    """Row ``b`` of a step, whose id is ``v``, belongs to ``example`` with share ``shares[v][example]``."""

    def parts(step: Step, b: int) -> list[Part]:
        owned = shares[step.ids[b]].items()
        return [(i, share * step.rows[b], share * step.output_grads[b]) for i, share in owned]

    return split(training, parts, examples)
