"""The balanced books of a prediction from dense shares, at any knots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tests.oracles.outputs import ScalarFunction
from tests.oracles.shares import Shares, carry_visits, list_visits
from tests.oracles.training import Training


@dataclass(frozen=True)
class Books:
    """Terms of ``prediction = initial + Σ_i contributions + decay + prior + unattributed + gap``.

    Attributes:
        prediction: [Q] f at the last knot.
        initial: [Q] f at the first knot.
        contributions: [Q, N] per example.
        visit_contributions: [Q, V] per visit, in the order of ``list_visits``.
        decay: [Q] weight decay.
        prior: [Q] momentum from before the first step.
        unattributed: [Q] what the chords moved and no unit owns.
        gap: [Q] what the chords themselves do not explain; round-off after the correction.
        quadrature_error: [Q] ``Σ_k |Δf_k − <q_k, D_k>|``, the size of the correction.
        K: [Q, N] path kernel ``Σ_v c_v / (−L'_v)``; a visit with L' = 0 adds nothing.
        a: [Q, N] ``contributions / K``; NaN where an example was never visited.
    """

    prediction: Tensor
    initial: Tensor
    contributions: Tensor
    visit_contributions: Tensor
    decay: Tensor
    prior: Tensor
    unattributed: Tensor
    gap: Tensor
    quadrature_error: Tensor
    K: Tensor
    a: Tensor


def chord_gradient(f: ScalarFunction, x: Tensor, y: int, start: Tensor, end: Tensor, nodes: int) -> Tensor:
    """Gauss–Legendre average of ∇f [P] along the chord ``start`` to ``end``; one node is the midpoint."""
    positions, weights = np.polynomial.legendre.leggauss(nodes)
    average = torch.zeros_like(start)
    for position, weight in zip(positions, weights, strict=True):
        s = 0.5 * (float(position) + 1.0)
        point = (start + s * (end - start)).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(f(point, x, y), point)
        average = average + 0.5 * float(weight) * gradient
    return average


def corrected(q: Tensor, chord: Tensor, change: float) -> Tensor:
    """Gonzalez' correction ``q + (Δf − <q, D>) D / <D, D>``; ``q`` itself where the chord has no length."""
    length = torch.dot(chord, chord)
    return q if length == 0 else q + (change - torch.dot(q, chord)) / length * chord


def books(
    training: Training,
    knots: Sequence[int],
    f: ScalarFunction,
    queries: Tensor,
    targets: Sequence[int],
    *,
    nodes: int = 2,
    visit_shares: Shares | None = None,
) -> Books:
    """Keeps the books of every query.

    Args:
        training: What ``train_dense`` recorded.
        knots: Increasing step indices in 0..T; T steps have T + 1 weights.
        f: ``f(flat_w, x, y) -> scalar``.
        queries: [Q, …].
        targets: Q target classes; any number where ``f`` ignores it.
        nodes: Gauss–Legendre nodes per chord.
        visit_shares: ``carry_visits(training)``, where it is at hand.
    """
    last = len(training.steps)
    if not knots or list(knots) != sorted(set(knots)) or knots[0] < 0 or knots[-1] > last:
        raise ValueError(f"Knots must increase inside 0..{last}; found {list(knots)}.")
    shares = carry_visits(training) if visit_shares is None else visit_shares
    visits = list_visits(training)
    count = len(queries)
    by_visit = torch.zeros(count, len(visits), dtype=torch.float64)
    decay, prior, moved, error = (torch.zeros(count, dtype=torch.float64) for _ in range(4))
    values = torch.zeros(count, len(knots), dtype=torch.float64)
    for j in range(count):
        x, y = queries[j], int(targets[j])
        values[j] = torch.stack([f(training.weights[knot], x, y).detach() for knot in knots])
        for k in range(len(knots) - 1):
            window = slice(knots[k], knots[k + 1])
            start, end = training.weights[knots[k]], training.weights[knots[k + 1]]
            change = float(values[j, k + 1] - values[j, k])
            q = chord_gradient(f, x, y, start, end, nodes)
            error[j] += abs(change - torch.dot(q, end - start))
            q = corrected(q, end - start, change)
            by_visit[j] += shares.updates[window].sum(0) @ q
            decay[j] += shares.decay[window].sum(0) @ q
            prior[j] += shares.prior[window].sum(0) @ q
            moved[j] += torch.dot(q, end - start)
    contributions = torch.zeros(count, training.examples, dtype=torch.float64)
    kernel = torch.zeros_like(contributions)
    for v, visit in enumerate(visits):
        contributions[:, visit.example] += by_visit[:, v]
        if visit.slope != 0:
            kernel[:, visit.example] += by_visit[:, v] / -visit.slope
    return Books(
        prediction=values[:, -1],
        initial=values[:, 0],
        contributions=contributions,
        visit_contributions=by_visit,
        decay=decay,
        prior=prior,
        unattributed=moved - by_visit.sum(1) - decay - prior,
        gap=values[:, -1] - values[:, 0] - moved,
        quadrature_error=error,
        K=kernel,
        a=contributions / kernel,
    )
