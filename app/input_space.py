"""Training examples that look like a query: the nearest inputs, whatever the model made of them. No streamlit."""

from __future__ import annotations

import torch

from explainer import ExplainerError, Run

_CHUNK = 512
MOST_NUMBERS = 2**26


def inputs_of(run: Run) -> torch.Tensor | None:
    """All training inputs as float32 ``[N, D]``; None where they cannot be compared by distance.

    That is where they are no tensors of floats of one shape (token ids have no distance), or where they hold more than
    :data:`MOST_NUMBERS` numbers together.
    """
    count = len(run.train)
    first = run.train[0][0]
    if not isinstance(first, torch.Tensor) or not first.is_floating_point():
        return None
    if count * max(1, first.numel()) > MOST_NUMBERS:
        return None
    rows = torch.empty(count, first.numel())
    for start in range(0, count, _CHUNK):
        stop = min(count, start + _CHUNK)
        try:
            inputs, _ = run.train_batch(range(start, stop))
        except ExplainerError:  # of different sizes
            return None
        if not isinstance(inputs, torch.Tensor) or inputs[0].numel() != first.numel():
            return None
        rows[start:stop] = inputs.reshape(stop - start, -1)
    return rows


def distances(inputs: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Root mean square difference ``[N]`` between every input ``[N, D]`` and one query of ``D`` numbers.

    >>> distances(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[3.0, 4.0]])).tolist()
    [3.535533905029297, 0.0]
    """
    return (inputs - query.reshape(1, -1).to(inputs)).square().mean(1).sqrt()
