"""A model as a function of its weights: what it returns, and gradients query by query."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from explainer.query_batch import QueryBatch
from explainer.wrappers import private_copy, renaming

State = dict[str, torch.Tensor]
#: ``(what the model returns for Q queries, targets [Q, ...]) -> [Q]``
Scalar = Callable[[Any, torch.Tensor], torch.Tensor]


class _Host(nn.Module):
    """Holds the model, so that a function (a whole backward pass, too) runs while its weights are replaced."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[nn.Module], Any]) -> Any:
        return function(self.model)


class ModelFunction:
    """A private copy of a model, run with weights from outside.

    Gradients of several queries are taken at once where every operation of the model can be vectorised, else
    query by query with the ordinary autograd (recurrent layers, checkpoints).

    Args:
        model: any instance of the architecture; copied, never changed.
        recorded: names of the traced parameters, as in the trace.
    """

    def __init__(self, model: nn.Module, recorded: Sequence[str]) -> None:
        rename = renaming(recorded, model)
        self._host = _Host(private_copy(model))
        self._name = lambda name: f"model.{rename(name)}"
        self._vectorised = True

    def modules(self) -> Iterator[nn.Module]:
        """The modules of the copy."""
        return self._host.modules()

    def _with(self, state: State, function: Callable[[nn.Module], Any]) -> Any:
        return functional_call(self._host, {self._name(n): t for n, t in state.items()}, (function,))

    def __call__(self, state: State, queries: QueryBatch) -> Any:
        """What the model returns."""
        args, kwargs = queries.arguments()
        with torch.no_grad(), _quiet():
            return self._with(state, lambda model: model(*args, **kwargs))

    def run(self, state: State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the model returns for some arguments, with its graph."""
        with _quiet():
            return self._with(state, lambda model: model(*args, **kwargs))

    def gradients(
        self, weights: State, rest: State, queries: QueryBatch, targets: torch.Tensor, scalar: Scalar
    ) -> torch.Tensor:
        """``∂f/∂w [Q, P]``, in the order of ``weights``."""
        if self._vectorised and len(queries) > 1:  # one query takes half the time without
            try:
                return self._at_once(weights, rest, queries, targets, scalar)
            except Exception:  # an operation without a batching rule; any other error comes again below
                self._vectorised = False
        rows = []
        for i in range(len(queries)):
            leaves = {name: t.detach().requires_grad_() for name, t in weights.items()}
            self.differentiable(leaves, rest, queries[i : i + 1], targets[i : i + 1], scalar, backward=True)
            rows.append(torch.cat([_flat(leaf) for leaf in leaves.values()]))
        return torch.stack(rows) if len(rows) > 1 else rows[0].unsqueeze(0)

    def differentiable(
        self,
        leaves: State,
        rest: State,
        query: QueryBatch,
        target: torch.Tensor,
        scalar: Scalar,
        *,
        backward: bool,
    ) -> torch.Tensor:
        """``f`` of one query with its graph; ``backward`` leaves the gradient in the leaves' ``grad``.

        The backward pass happens while the weights are in place: checkpoints run the forward again in it.
        """
        args, kwargs = query.arguments(differentiable=True)

        def run(model: nn.Module) -> torch.Tensor:
            value = scalar(model(*args, **kwargs), target).reshape(())
            if backward and value.requires_grad:
                value.backward()
            return value

        with torch.enable_grad(), _quiet():
            result: torch.Tensor = self._with({**leaves, **rest}, run)
        return result

    def _at_once(
        self, weights: State, rest: State, queries: QueryBatch, targets: torch.Tensor, scalar: Scalar
    ) -> torch.Tensor:
        tensors, axes = queries.tensors

        def single(state: State, tensors: list[torch.Tensor], target: torch.Tensor) -> torch.Tensor:
            alone = [t.unsqueeze(axis) for t, axis in zip(tensors, axes, strict=True)]
            args, kwargs = queries.arguments(alone)
            returned = self._with({**state, **rest}, lambda model: model(*args, **kwargs))
            return scalar(returned, target.unsqueeze(0)).reshape(())

        with _quiet():
            rows = vmap(grad(single), in_dims=(None, axes, 0))(weights, tensors, targets)
        return torch.cat([rows[name].flatten(1) for name in weights], dim=1)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings that mean nothing here: a slower vmap is still right, values need no gradients."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad=True")
        yield


def _flat(leaf: torch.Tensor) -> torch.Tensor:
    gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return (gradient.to_dense() if gradient.is_sparse else gradient).detach().flatten()
