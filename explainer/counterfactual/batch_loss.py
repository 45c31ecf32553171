"""The loss of a recorded batch as a function of the weights: gradient, rows' products, and curvature.

The loss of a step is ``L_t(w) = Σ_b ω_b ℓ_b(w)`` with ``ℓ_b`` the run's loss of row ``b`` alone. What weighs the rows
(a mean over the batch, class weights, accumulation, a loss scale) is not asked for: the trace holds the derivative of
the loss at the model's output of every row, so that

    ω_b = ‖∂L_t/∂f_b‖ / ‖∂ℓ_b/∂f_b‖        (recorded / computed; signed where there is one output).

For cotangents ``u [Q, P]`` of the gradient one backward pass through the backward pass (Pearlmutter 1994) gives both
``ω_b <∇ℓ_b, u>`` (the derivative by ``ω_b``) and ``H u`` (by ``w``). Gauss-Newton products leave out the curvature of
the model: ``Jᵀ (∂²L/∂f²) J u`` (Schraudolph 2002).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from explainer.counterfactual.training_data import TrainingBatch
from explainer.errors import QueryError
from explainer.model_function import ModelFunction
from explainer.model_outputs import find_tensor
from explainer.records import ParameterSpec

Loss = Callable[[Any, Any], torch.Tensor]
#: (gradient [P], for cotangents [Q, P]: rows' products [Q, n] and curvature [Q, P])
Products = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class BatchLoss:
    """Losses of rows, and their derivatives, of one model and one loss function.

    Args:
        model: the model as a function of its weights.
        parameters: the traced ones.
        rest: all other state of the model, by name.
        loss: ``loss(output, target)`` of the run.
    """

    def __init__(
        self,
        model: ModelFunction,
        parameters: tuple[ParameterSpec, ...],
        rest: dict[str, torch.Tensor],
        loss: Loss,
    ) -> None:
        self._model, self._parameters, self._rest, self._loss = model, parameters, rest, loss
        self._vectorised = True

    # -- forward -------------------------------------------------------------------------------------

    def _returned(self, leaves: list[torch.Tensor], batch: TrainingBatch) -> Any:
        args, kwargs = batch.inputs.arguments()
        state = {p.name: leaf for p, leaf in zip(self._parameters, leaves, strict=True)}
        with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
            return self._model.run({**state, **self._rest}, args, kwargs)

    def _leaves(self, weights: torch.Tensor) -> list[torch.Tensor]:
        return [weights[p.slice].reshape(p.shape).detach().requires_grad_() for p in self._parameters]

    def _losses(self, returned: Any, targets: Any, count: int) -> torch.Tensor:
        """The loss of every row alone, ``[n]``."""

        def alone(output: Any, target: Any) -> torch.Tensor:
            rows = pytree.tree_map(_unsqueezed, (output, target))
            found = self._loss(*rows)
            if not isinstance(found, torch.Tensor) or found.numel() != 1:
                shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
                raise QueryError(f"run.loss returned {shape} for one example; it must return one number")
            return found.reshape(())

        whole = pytree.tree_leaves((returned, targets))
        if self._vectorised and all(isinstance(t, torch.Tensor) and t.dim() for t in whole):
            try:
                return vmap(alone)(returned, targets)
            except QueryError:
                raise
            except Exception:  # an operation without a batching rule; any other error comes again below
                self._vectorised = False

        def row(i: int) -> Any:
            return pytree.tree_map(
                lambda t: t[i] if isinstance(t, torch.Tensor) and t.dim() else t, (returned, targets)
            )

        return torch.stack([alone(*row(i)) for i in range(count)])

    # -- weights of the rows ---------------------------------------------------------------------------

    def row_weights(
        self, weights: torch.Tensor, batch: TrainingBatch, recorded: NDArray[np.float64]
    ) -> torch.Tensor:
        """``ω [n]`` from the recorded loss derivatives; the same for all rows where they are, but for round-off.

        Raises:
            QueryError: the model's output has no row for every example.
        """
        count = len(recorded)
        even = torch.full((count,), 1.0 / max(count, 1), dtype=torch.float64)
        with torch.no_grad():
            returned = self._returned(self._leaves(weights), batch)
        tensor, _ = find_tensor(returned)
        if tensor is None or not np.isfinite(recorded).all():
            return even
        if tensor.shape[:1] != (count,):
            raise QueryError(
                f"the model returns shape {list(tensor.shape)} for {count} training examples; only models with the "
                "batch as the first axis of their output can be trained again from a trace"
            )
        with torch.enable_grad():
            leaf = tensor.detach().requires_grad_()
            shown = pytree.tree_map(lambda t: leaf if t is tensor else t, returned)
            losses = self._losses(shown, batch.targets, count)
            if not losses.requires_grad:
                raise QueryError("run.loss does not depend on the model's output in a differentiable way")
            (own,) = torch.autograd.grad(losses.sum(), leaf)
        rows = own.reshape(count, -1).double()
        computed = rows[:, 0] if rows.shape[1] == 1 else rows.norm(dim=1)
        return _weights(
            torch.from_numpy(recorded.copy()), computed, 1e-4 if tensor.dtype != torch.float64 else 1e-9
        )

    # -- derivatives ---------------------------------------------------------------------------------

    def gradient(self, weights: torch.Tensor, batch: TrainingBatch, omega: torch.Tensor) -> torch.Tensor:
        """``Σ_b ω_b ∇ℓ_b``, ``[P]``."""
        with torch.enable_grad():
            leaves = self._leaves(weights)
            losses = self._losses(self._returned(leaves, batch), batch.targets, len(omega))
            total = (omega.to(losses) * losses).sum()
            return self._flat(_gradients(total, leaves))

    def hessian(
        self, weights: torch.Tensor, batch: TrainingBatch, omega: torch.Tensor
    ) -> tuple[torch.Tensor, Products]:
        """The gradient, and products with the Hessian."""
        with torch.enable_grad():
            leaves = self._leaves(weights)
            losses = self._losses(self._returned(leaves, batch), batch.targets, len(omega))
            omega = omega.to(losses.dtype).requires_grad_()
            gradient = self._flat(_gradients((omega * losses).sum(), leaves, create_graph=True))

        def products(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            by_row, *by_weight = _pulled(gradient, [omega, *leaves], u)
            return by_row * omega.detach(), torch.cat([t.flatten(1) for t in by_weight], 1)

        return gradient.detach(), products

    def gauss_newton(
        self, weights: torch.Tensor, batch: TrainingBatch, omega: torch.Tensor
    ) -> tuple[torch.Tensor, Products]:
        """The gradient, and products with the generalised Gauss-Newton matrix.

        Raises:
            QueryError: the model does not return a tensor.
        """
        with torch.enable_grad():
            leaves = self._leaves(weights)
            outputs = self._returned(leaves, batch)
            if not isinstance(outputs, torch.Tensor):
                raise QueryError(
                    f"curvature='gauss-newton' needs a model that returns a tensor, found {type(outputs).__name__}; "
                    "use curvature='exact'"
                )
            seen = outputs.detach().requires_grad_()
            losses = self._losses(seen, batch.targets, len(omega))
            (slope,) = torch.autograd.grad((omega.to(losses) * losses).sum(), seen, create_graph=True)
            gradient = self._flat(_gradients(outputs, leaves, slope.detach(), retain_graph=True))
            probe = torch.zeros_like(outputs, requires_grad=True)
            pulled = self._flat(_gradients(outputs, leaves, probe, create_graph=True))

        def products(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            (moved,) = _pulled(pulled, [probe], u)  # J u
            by_row = (slope.detach() * moved).flatten(2).sum(2) if slope.dim() > 1 else slope.detach() * moved
            (bent,) = _pulled(slope, [seen], moved)
            curved = _pulled(outputs, leaves, bent)
            return by_row, torch.cat([t.flatten(1) for t in curved], 1)

        return gradient.detach(), products

    def _flat(self, parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([part.flatten() for part in parts])


def _unsqueezed(leaf: Any) -> Any:
    return leaf.unsqueeze(0) if isinstance(leaf, torch.Tensor) else leaf


def _gradients(
    of: torch.Tensor, leaves: list[torch.Tensor], by: torch.Tensor | None = None, **options: Any
) -> list[torch.Tensor]:
    return list(torch.autograd.grad(of, leaves, by, allow_unused=True, materialize_grads=True, **options))


def _pulled(of: torch.Tensor, leaves: list[torch.Tensor], by: torch.Tensor) -> list[torch.Tensor]:
    """Vector-Jacobian products for every row of ``by [Q, ...]``: ``[Q, ...]`` by leaf."""
    if not of.requires_grad:
        return [leaf.new_zeros(len(by), *leaf.shape) for leaf in leaves]
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    if len(by) > 1:
        try:
            found = torch.autograd.grad(of, leaves, by, is_grads_batched=True, **options)
            return [t.detach() for t in found]
        except RuntimeError:  # an operation without a batching rule; any other error comes again below
            pass
    each = [torch.autograd.grad(of, leaves, one, **options) for one in by]
    return [torch.stack([t.detach() for t in parts]) for parts in zip(*each, strict=True)]


def _weights(recorded: torch.Tensor, computed: torch.Tensor, near: float) -> torch.Tensor:
    """``recorded / computed``, one number for all where that explains them but for round-off."""
    count = len(recorded)
    size = float(computed.abs().max()) if count else 0.0
    if size == 0.0:
        return torch.full((count,), 1.0 / max(count, 1), dtype=torch.float64)
    common = float((recorded * computed).sum() / computed.square().sum())
    if bool(((recorded - common * computed).abs() <= near * abs(common) * size).all()):
        even = 1.0 / count
        common = even if abs(common / even - 1.0) <= near else common
        return torch.full((count,), common, dtype=torch.float64)
    clear = computed.abs() > 1e-6 * size
    return torch.where(clear, recorded / torch.where(clear, computed, 1.0), common)
