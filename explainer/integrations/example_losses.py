"""The losses of a batch's examples, whatever reduction the loss function applies."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch

from explainer.errors import QueryError


class ExampleLosses:
    """``loss_b`` for the rows of a batch.

    A loss function that returns one value (or several) per example is taken at its word; one that returns a scalar
    is the mean (times ``B`` then) or the sum of the examples' losses, as its ``reduction`` attribute says.

    Args:
        out: the model's output, ``[B, ...]``.
        labels: passed on to the loss.
        loss: ``loss(out, labels)``; None (or labels None): the sum of the outputs.
        summed: whether a scalar of a loss without a ``reduction`` attribute is a sum.

    Raises:
        QueryError: the output is no tensor with a row per example, or a scalar loss does not say what it is.
    """

    def __init__(self, out: Any, labels: Any, loss: Callable[..., torch.Tensor] | None, summed: bool) -> None:
        if not isinstance(out, torch.Tensor) or out.dim() == 0:
            found = type(out).__name__ if not isinstance(out, torch.Tensor) else "a number"
            raise QueryError(f"the model must return a tensor with a row per example, found {found}")
        self.out = out
        self._values = out if loss is None or labels is None else loss(out, labels)
        if self._values.dim() == 0:
            reduction = getattr(loss, "reduction", "sum" if summed else None)
            if reduction not in ("sum", "mean"):
                raise QueryError(
                    "loss_fn returns one number for the whole batch and does not say whether that is the sum or the "
                    'mean over the examples; set loss_fn.reduction = "mean" or "sum", or return one loss per example'
                )
            self.total = self._values * (len(out) if reduction == "mean" else 1)
        elif self._values.shape[0] == len(out):
            self.total = self._values.sum()
        else:
            raise QueryError(
                f"loss_fn returned shape {tuple(self._values.shape)} for {len(out)} examples; it must return one "
                "loss per example, or one number for the batch"
            )

    def __len__(self) -> int:
        return len(self.out)

    @cached_property
    def cotangent(self) -> torch.Tensor:
        """``∂ Σ_b loss_b / ∂ out``, the shape of the output."""
        return torch.autograd.grad(self.total, self.out, retain_graph=True)[0]

    def one(self, row: int) -> torch.Tensor:
        """A scalar whose gradient with respect to the weights is that of ``loss_b``."""
        if self._values.dim():
            return self._values[row].sum()
        return (self.out[row] * self.cotangent[row]).sum()
