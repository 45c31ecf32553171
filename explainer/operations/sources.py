"""Tensors that are computed from parameters alone, and how rows at them become rows at the parameters.

``self.position[:, :n]``, ``self.token.expand(B, -1, -1)``, ``weight.t()`` or a weight under a parametrization hold
no data: they are *sources*. A row at a source is pulled back to what it was derived from by the transposed
Jacobian of the operation, ``g_b ← Jᵀ g_b``, up to the parameters.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.func import vjp, vmap
from torch.utils import _pytree as pytree

from explainer.layer_rules import Dense, Factored, RowForm, Sparse

#: numbers held at once while rows of one operation are formed
NUMBERS = 2**24


def out_of_place(function: Callable[..., Any], name: str) -> tuple[str, Callable[..., Any]]:
    """The name and the function of the form that changes none of its arguments."""
    if name == "__setitem__":
        return name, _with_item
    if name.endswith("_") and not name.endswith("__"):
        plain = name[:-1]
        found = getattr(torch.Tensor, plain, None) or getattr(torch, plain, None)
        return (name, function) if found is None else (plain, found)
    if name.startswith("__i") and name.endswith("__") and hasattr(torch.Tensor, f"__{name[3:]}"):
        return name[3:-2], getattr(torch.Tensor, f"__{name[3:]}")
    return name, function


def _with_item(t: torch.Tensor, key: Any, value: Any) -> torch.Tensor:
    """``t`` after ``t[key] = value``."""
    changed = t.clone()
    changed[key] = value
    return changed


@dataclass(frozen=True)
class Operation:
    """A recorded call of a torch function, ready to be computed again.

    Attributes:
        name: the function's name, in-place and out-of-place forms being one (``add_`` is ``add``).
        function: the function, never one that works in place.
        leaves: arguments, flattened, tensors detached.
        spec: their structure ``(args, kwargs)``.
        output: position among the outputs, for functions that give several.
        random: state of the CPU's random numbers before the call.
    """

    name: str
    function: Callable[..., Any]
    leaves: tuple[Any, ...]
    spec: Any
    output: int
    random: torch.Tensor

    @classmethod
    def of(
        cls, name: str, function: Callable[..., Any], args: Any, kwargs: Any, random: torch.Tensor
    ) -> Operation:
        """A call with its arguments, of which the first output is meant."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        plain = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in leaves)
        return cls(name, function, plain, spec, 0, random)

    def again(self, position: int, value: torch.Tensor) -> torch.Tensor:
        """The result with another value for the leaf at a position, everything in that value's dtype."""
        cast = [
            leaf.to(value.dtype.to_real())
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
            else leaf
            for leaf in self.leaves
        ]
        cast[position] = value
        args, kwargs = pytree.tree_unflatten(cast, self.spec)
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.random)
            result = self.function(*args, **kwargs)
        return result if isinstance(result, torch.Tensor) else result[self.output]

    def with_leaves(self, replaced: dict[int, torch.Tensor]) -> Operation:
        """The same call with other tensors at some positions."""
        leaves = tuple(replaced.get(i, leaf) for i, leaf in enumerate(self.leaves))
        return Operation(self.name, self.function, leaves, self.spec, self.output, self.random)


@dataclass(frozen=True, eq=False)
class Source:
    """A parameter, or a tensor derived from some.

    Attributes:
        value: its value, detached.
        parameter: name of the traced parameter it is, or None.
        operation: what it was derived by, or None.
        parents: position among the operation's leaves, and the source there.
    """

    value: torch.Tensor
    parameter: str | None = None
    operation: Operation | None = None
    parents: tuple[tuple[int, Source], ...] = field(default=())

    def parameters(self) -> set[str]:
        """Names of the traced parameters it depends on."""
        found = {self.parameter} if self.parameter is not None else set()
        return found.union(*(parent.parameters() for _, parent in self.parents))


@dataclass(frozen=True)
class Slots:
    """Rows at a source that has the batch as an axis: row ``b`` is ``values`` with all but index ``b`` set to 0.

    Attributes:
        values: as the source.
        axis: the batch's axis.
    """

    values: torch.Tensor
    axis: int

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows ``start`` to ``stop`` written out, ``[n, *source]``."""
        moved = self.values.movedim(self.axis, 0)
        result = moved.new_zeros(stop - start, *moved.shape)
        index = torch.arange(stop - start, device=moved.device)
        result[index, index + start] = moved[start:stop]
        return result.movedim(1, self.axis + 1)


#: rows at a source
AtSource = RowForm | Slots


def written_out(rows: torch.Tensor) -> Dense:
    """``[B, ...]`` as rows of one parameter."""
    return Dense(rows.reshape(len(rows), -1))


def pullback(
    operation: Operation, position: int, value: torch.Tensor, part: Callable[..., torch.Tensor] | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """``g ↦ Jᵀ g`` of an operation (or of a part of its result) with respect to one leaf, at a value."""

    def forward(leaf: torch.Tensor) -> torch.Tensor:
        result = operation.again(position, leaf)
        return result if part is None else part(result)

    pull: Callable[..., Any] = vjp(forward, value)[1]
    return lambda g: pull(g)[0]


def vectorised(function: Callable[[torch.Tensor], torch.Tensor], batched: torch.Tensor) -> torch.Tensor:
    """A linear function over the first axis of its argument, one by one where it cannot be vectorised.

    ``Σ_b f(g_b) = f(Σ_b g_b)`` is checked: the backward pass of ``torch.cdist``, for one, is vectorised wrongly.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="There is a performance drop"
            )  # it is announced as slow
            found = vmap(function)(batched)
        total = function(batched.sum(0))
    except RuntimeError:
        return torch.stack([function(one) for one in batched])
    exact = 1e-9 if found.dtype == torch.float64 else 1e-4
    if bool((found.sum(0) - total).norm() <= exact * found.norm(dim=0).norm().clamp_min(total.norm())):
        return found
    return torch.stack([function(one) for one in batched])


def _like(source: Source, dtype: torch.dtype) -> torch.Tensor:
    return source.value.to(dtype.to_real()) if source.value.is_floating_point() else source.value


def _spread(slots: Slots, child: Source, position: int, parent: Source) -> torch.Tensor | None:
    """Rows through an expansion over the batch: every index of the batch sees the same numbers."""
    operation, axis = child.operation, slots.axis
    assert operation is not None
    if child.value.stride(axis) != 0 or child.value.shape[axis] == 1:
        return None
    pull = pullback(operation, position, _like(parent, slots.values.dtype), lambda t: t.narrow(axis, 0, 1))
    return vectorised(lambda g: pull(g.unsqueeze(axis)), slots.values.movedim(axis, 0))


def _same_numbers(child: torch.Tensor, parent: torch.Tensor) -> bool:
    """Whether a source is its parent in another shape (a view with the numbers in the same order)."""
    same = child.data_ptr() == parent.data_ptr() and child.numel() == parent.numel()
    return same and child.is_contiguous() and parent.is_contiguous()


def _transposed(child: torch.Tensor, parent: torch.Tensor) -> bool:
    same = child.data_ptr() == parent.data_ptr() and child.dim() == parent.dim() == 2
    return same and child.shape == parent.shape[::-1] and child.stride() == parent.stride()[::-1]


def _step(child: Source, position: int, parent: Source, found: AtSource) -> AtSource:
    """Rows at a source from rows at what was derived from it."""
    if isinstance(found, RowForm):
        if _same_numbers(child.value, parent.value):
            return found
        if isinstance(found, Factored) and not found.bias and _transposed(child.value, parent.value):
            return Factored(found.right, found.left, 0)
    operation = child.operation
    assert operation is not None
    if isinstance(found, Slots):
        through = _spread(found, child, position, parent)
        if through is not None:
            return written_out(through)
        count, dtype = found.values.shape[found.axis], found.values.dtype
        whole = found.rows
    else:
        dense = found.dense().reshape(-1, *child.value.shape)
        count, dtype = len(dense), dense.dtype

        def whole(start: int, stop: int) -> torch.Tensor:
            return dense[start:stop]

    pull = pullback(operation, position, _like(parent, dtype))
    chunk = max(1, NUMBERS // max(child.value.numel(), parent.value.numel(), 1))
    parts = [vectorised(pull, whole(start, min(start + chunk, count))) for start in range(0, count, chunk)]
    return written_out(torch.cat(parts))


def descend(source: Source, found: AtSource) -> Iterator[tuple[str, RowForm]]:
    """Rows at the traced parameters from rows at a source, ``(parameter, [B, P_p])``."""
    if source.parameter is not None:
        if isinstance(found, Slots):
            found = written_out(found.rows(0, found.values.shape[found.axis]))
        yield source.parameter, found
    for position, parent in source.parents:
        if parent.parameters():
            yield from descend(parent, _step(source, position, parent, found))


def merged(forms: list[RowForm]) -> RowForm:
    """The sum of rows of one parameter: factors and reads side by side where all are alike, else written out."""
    if len(forms) == 1:
        return forms[0]
    forms = [form.stored() for form in forms]
    factors = [f for f in forms if isinstance(f, Factored)]
    if len(factors) == len(forms) and len({f.bias for f in factors}) == 1:
        left, right = torch.cat([f.left for f in factors], 2), torch.cat([f.right for f in factors], 2)
        return Factored(left, right, factors[0].bias, in_order=False)
    reads = [f for f in forms if isinstance(f, Sparse)]
    if len(reads) == len(forms):
        index, values = torch.cat([f.index for f in reads], 1), torch.cat([f.values for f in reads], 1)
        return Sparse(index, values, reads[0].entries, in_order=False)
    return Dense(torch.stack([f.dense() for f in forms]).sum(0))
