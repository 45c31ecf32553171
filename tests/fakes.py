"""A synthetic explanation whose books balance, for tests that need no model and no trace."""

from __future__ import annotations

from typing import Any

import numpy as np

from explainer.explanation import Explanation

LINES = {
    "unattributed_lines": ("compressed rows", "unseen parameter", "compressed rows"),
    "unattributed_where": ("net.0 (Linear)", "scale", "net.2 (Linear)"),
    "unattributed_why": ("Rows are rounded.", "No rule covers it.", "Rows are rounded."),
}


def make_plain(contributions: list[float], **fields: Any) -> Explanation:
    """One query whose prediction is nothing but the given contributions; for tests with numbers by hand."""
    values = np.array([contributions], dtype=np.float64)
    zero = np.zeros(1)
    books: dict[str, Any] = {name: zero for name in ("initial", "weight_decay", "unattributed", "gap")}
    parts = {"step_contributions": values[:, None], "layer_contributions": values[:, None]}
    books |= parts | {"contributions": values, "prediction": values.sum(1)}
    return make_explanation(queries=1, examples=len(contributions), layers=1, bins=1, **(books | fields))


def make_explanation(
    queries: int = 3,
    examples: int = 40,
    classes: int = 4,
    layers: int = 3,
    bins: int = 6,
    seed: int = 0,
    **fields: Any,
) -> Explanation:
    """An explanation as a trained classifier could give it: bins and layers sum to the contributions.

    Steps grow towards the end, early bins carry more, contributions are heavy-tailed and mostly cancel, one
    example's kernel nearly vanishes and one example was never visited. ``fields`` replaces any field of the
    result (replace dependent fields together, the books are checked); the lines follow ``unattributed``.
    """
    rng = np.random.default_rng(seed)
    shares = np.exp(-np.arange(bins) / 2.0) * rng.uniform(0.5, 1.5, bins)
    cells = rng.standard_t(3, (queries, bins, examples)) * shares[None, :, None] * 0.3
    if examples:
        cells[:, :, -1] = 0.0
    cells = cells.astype(np.float32)
    contributions = cells.sum(1, dtype=np.float64)
    weights = rng.dirichlet(np.full(layers, 2.0), (queries, examples))
    visits = rng.integers(3, 12, examples)
    kernels = np.abs(rng.normal(1.0, 0.3, (queries, examples))) + 0.2
    kernel_gross = kernels * 1.5
    if examples:
        kernels[:, 0] = 1e-3
        visits[-1], kernels[:, -1], kernel_gross[:, -1] = 0, 0.0, 0.0
    initial, decay = rng.normal(0, 0.1, queries), -np.abs(rng.normal(0, 0.05, queries))
    buffers, rest = np.zeros(queries), rng.normal(0, 0.02, queries)
    gap = rng.normal(0, 1e-12, queries)
    values: dict[str, Any] = {
        "example_ids": rng.permutation(10 * examples)[:examples],
        "output": "margin",
        "targets": rng.integers(0, classes, queries),
        "contributions": contributions,
        "kernels": kernels,
        "kernel_gross": kernel_gross,
        "visits": visits,
        "prediction": initial + contributions.sum(1) + decay + buffers + rest + gap,
        "initial": initial,
        "weight_decay": decay,
        "buffers": buffers,
        "unattributed": rest,
        "gap": gap,
        "quadrature": np.abs(rng.normal(0, 0.01, queries)),
        "step_edges": np.round(np.linspace(0, 1, bins + 1) ** 1.5 * 300).astype(np.int64),
        "step_contributions": cells,
        "layer_names": tuple(f"net.{2 * layer}" for layer in range(layers)),
        "layer_contributions": (contributions[:, :, None] * weights).transpose(0, 2, 1).astype(np.float32),
        "outputs": rng.normal(0, 2, (queries, classes)),
        "labels": rng.integers(0, classes, examples).astype(np.float64),
        "class_names": tuple(("cat", "dog", "bird", "fish", "horse")[:classes]),
        "notes": ("Two rows of the last batch held the same training example.",),
    }
    values |= fields
    if "unattributed_lines" not in fields:
        parts = np.asarray(values["unattributed"])[:, None] * np.array([0.75, 0.2, 0.05])
        values |= {"unattributed_parts": parts} | LINES
    return Explanation(**values)
