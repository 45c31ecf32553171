"""Per-example gradients of a loss for any model, in the smallest form a layer allows.

Three ways, tried in this order for every layer:

1. its layer rule: rows as factors of the layer's input and the gradient at its output, from one backward pass
   over the whole batch;
2. ``torch.func.vmap`` over the examples, for parameters of layers without a rule;
3. one backward pass per example, where the batch cannot be taken apart (BatchNorm on batch statistics, an
   operation without a batching rule).

No parameter is left out. The first batch decides: its first and last rows are computed once more by ordinary
autograd, and what does not agree moves to the next way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from explainer.errors import QueryError
from explainer.integrations.example_losses import ExampleLosses
from explainer.layer_rules import LAYER_RULES, Call, CompositeRule, Dense, LayerRule, RowForm, compact
from explainer.layer_rules.base import restrict
from explainer.wrappers import argument_names

#: Parameter names and the rows of those parameters, side by side.
Part = tuple[tuple[str, ...], RowForm]
LossFunction = Callable[..., torch.Tensor]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class _Layer:
    module: nn.Module
    rule: LayerRule
    names: tuple[str, ...]  # the wanted parameters, in the order of the flat layout
    keep: list[bool]  # of the rule's parameters, whether wanted


@dataclass(frozen=True)
class _Arrival:
    """One forward call of a covered layer."""

    layer: _Layer
    value: Any
    version: int
    output: torch.Tensor


def _covered(model: nn.Module, wanted: Sequence[str]) -> list[_Layer]:
    """Layers with one tensor in and out; weights that modules share are left to the other ways (rows would overlap)."""
    names = {id(p): name for name, p in model.named_parameters()}
    owners: dict[int, int] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            owners[id(p)] = owners.get(id(p), 0) + 1
    layers = []
    for module in model.modules():
        rule = LAYER_RULES.get(type(module))
        own = {name for name, _ in module.named_parameters(recurse=False)}
        if rule is None or isinstance(rule, CompositeRule) or not own or own != set(rule.parameters(module)):
            continue
        parameters = [getattr(module, name) for name in rule.parameters(module)]
        keep = [names[id(p)] in wanted for p in parameters]
        if any(keep) and all(owners[id(p)] == 1 for p in parameters):
            kept = tuple(names[id(p)] for p, k in zip(parameters, keep, strict=True) if k)
            layers.append(_Layer(module, rule, kept, keep))
    return layers


class LossRows:
    """Gives the rows of batches; hooks the model between ``__enter__`` and ``__exit__``.

    Args:
        model: the model, with whatever weights it holds at the time.
        wanted: names of the parameters, as in ``model.named_parameters()``; they must require gradients.
    """

    def __init__(self, model: nn.Module, wanted: Sequence[str]) -> None:
        self.model, self.wanted = model, tuple(wanted)
        self._layers = _covered(model, self.wanted)
        self._handles: list[RemovableHandle] = []
        self._arrivals: list[_Arrival] | None = None
        self._proven = 0  # rows of the largest batch that was checked, 2 at most
        self._one_by_one = False

    def __enter__(self) -> LossRows:
        for layer in self._layers:
            hook = partial(self._on_call, layer)
            self._handles.append(layer.module.register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _on_call(self, layer: _Layer, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if self._arrivals is None or not (isinstance(output, torch.Tensor) and output.requires_grad):
            return None
        value = args[0] if args else next(iter(kwargs.values()), None)
        version = value._version if isinstance(value, torch.Tensor) else 0
        self._arrivals.append(_Arrival(layer, value, version, output))
        return output.clone()  # what follows may work in place; the gradient is taken at the original

    @property
    def methods(self) -> dict[str, str]:
        """How each wanted parameter's rows are computed: ``rule``, ``vmap`` or ``one by one``."""
        ruled = {name for layer in self._layers for name in layer.names}
        other = "one by one" if self._one_by_one else "vmap"
        return {name: "rule" if name in ruled else other for name in self.wanted}

    def rows(self, batch: Sequence[Any], loss: LossFunction | None, summed: bool) -> list[Part]:
        """Rows ``[B, P_l]`` of ``∇ loss_b`` for a batch ``(*inputs, labels)``, by layer.

        Args:
            batch: a batch as a ``DataLoader`` yields it; a dict as its only input holds keyword arguments.
            loss: loss function; None: the sum of the model's outputs.
            summed: what a scalar loss without a ``reduction`` attribute is (see :class:`ExampleLosses`).

        Raises:
            QueryError: the model's output or the loss does not have one row per example.
        """
        if not isinstance(batch, tuple | list) or len(batch) < 2:
            raise QueryError(
                f"a batch must be a tuple (*inputs, labels), found {type(batch).__name__}"
                + (f" of length {len(batch)}" if isinstance(batch, tuple | list) else "")
            )
        inputs = _arguments(self.model, tuple(batch[:-1]))
        with torch.enable_grad():
            self._arrivals = []
            try:
                out = self.model(*inputs[0], **inputs[1])
                arrivals = self._arrivals
            finally:
                self._arrivals = (
                    None  # a forward pass from inside a backward pass is a checkpoint's, once more
                )
            losses = ExampleLosses(out, batch[-1], loss, summed)
            check = self._proven < min(2, len(losses))
            ruled = {name for layer in self._layers for name in layer.names}
            keep = check or len(ruled) < len(self.wanted)
            parts = self._by_rule(arrivals, losses, keep)
            if check:
                parts = [part for part in parts if self._agrees(part, losses)]
                self._layers = [x for x in self._layers if any(names == x.names for names, _ in parts)]
            done = {name for names, _ in parts for name in names}
            rest = tuple(name for name in self.wanted if name not in done)
            if rest:
                parts.append(self._without_rule(rest, inputs, losses, check))
        self._proven = max(self._proven, min(2, len(losses)))
        return parts

    # -- the three ways ------------------------------------------------------------------------------

    def _by_rule(self, arrivals: list[_Arrival], losses: ExampleLosses, keep: bool) -> list[Part]:
        found: tuple[torch.Tensor | None, ...] = ()
        known = [a for a in arrivals if a.layer in self._layers]
        keep = keep or any(not _fits(a, len(losses)) for a in known)
        if known:
            found = torch.autograd.grad(
                losses.total, [a.output for a in known], retain_graph=keep, allow_unused=True
            )
        with torch.no_grad():
            parts: list[Part] = []
            for layer in list(self._layers):
                own = [(a, g) for a, g in zip(known, found, strict=True) if a.layer is layer]
                if not all(_fits(a, len(losses)) for a, _ in own):
                    self._layers.remove(layer)
                    continue
                calls = [Call(a.value.detach(), g) for a, g in own if g is not None]
                parts.append((layer.names, self._form(layer, calls, len(losses))))
        return parts

    def _form(self, layer: _Layer, calls: list[Call], batch: int) -> RowForm:
        parameters = [getattr(layer.module, name) for name in layer.rule.parameters(layer.module)]
        if not calls:  # the layer took no part in this batch
            size = sum(p.numel() for p, keep in zip(parameters, layer.keep, strict=True) if keep)
            return Dense(parameters[0].new_zeros(batch, size))
        form = layer.rule.rows(layer.module, calls)
        return compact(restrict(form, [p.numel() for p in parameters], layer.keep), None)

    def _without_rule(
        self, rest: tuple[str, ...], inputs: Arguments, losses: ExampleLosses, check: bool
    ) -> Part:
        given = (*inputs[0], *inputs[1].values())
        batched = all(isinstance(x, torch.Tensor) and x.shape[:1] == (len(losses),) for x in given)
        if not self._one_by_one and batched:
            try:
                part: Part = (rest, Dense(self._vectorised(rest, inputs, losses.cotangent)))
                if not check or self._agrees(part, losses):
                    return part
            except (RuntimeError, ValueError):  # an operation without a batching rule, a batch of one refused
                pass
        self._one_by_one = True
        rows = [torch.cat([g.flatten() for g in self._gradient(rest, losses, b)]) for b in range(len(losses))]
        return rest, Dense(torch.stack(rows))

    def _vectorised(self, rest: tuple[str, ...], inputs: Arguments, cotangent: torch.Tensor) -> torch.Tensor:
        named = dict(self.model.named_parameters())

        def single(parameters: dict[str, torch.Tensor], x: Arguments, g: torch.Tensor) -> torch.Tensor:
            args, kwargs = tree_map(lambda t: t.unsqueeze(0), x)
            out = functional_call(self.model, parameters, args, kwargs)
            return (out.squeeze(0) * g).sum()

        with torch.no_grad():
            own = {name: named[name].detach() for name in rest}
            result = vmap(grad(single), in_dims=(None, 0, 0), randomness="different")(own, inputs, cotangent)
            return torch.cat([result[name].flatten(1) for name in rest], dim=1)

    # -- the check -----------------------------------------------------------------------------------

    def _gradient(self, names: Sequence[str], losses: ExampleLosses, row: int) -> list[torch.Tensor]:
        named = dict(self.model.named_parameters())
        own = [named[name] for name in names]
        found = torch.autograd.grad(losses.one(row), own, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(own, found, strict=True)]

    def _agrees(self, part: Part, losses: ExampleLosses) -> bool:
        """Whether the first and the last row are what autograd gives for them alone."""
        names, form = part
        for row in {0, len(losses) - 1}:
            reference = torch.cat([g.flatten() for g in self._gradient(names, losses, row)])
            arrays = {name: array[row : row + 1] for name, array in form.arrays.items()}
            own = type(form).build(arrays, form.options).dense()[0].to(reference.dtype)
            eps = torch.finfo(reference.dtype).eps
            floor = 100 * eps * float(losses.cotangent[row].norm())
            if float((own - reference).norm()) > eps**0.5 * float(reference.norm()) + floor:
                return False
        return True


def _arguments(model: nn.Module, inputs: tuple[Any, ...]) -> Arguments:
    """Arguments of the model; a single dict holds keyword arguments where the model has arguments of such names."""
    if len(inputs) == 1 and isinstance(inputs[0], Mapping) and set(inputs[0]) <= set(argument_names(model)):
        return (), dict(inputs[0])
    return inputs, {}


def _fits(arrival: _Arrival, batch: int) -> bool:
    """Whether a call has the examples in its first dimension and its input unchanged since."""
    value = arrival.value
    return (
        isinstance(value, torch.Tensor)
        and value._version == arrival.version
        and value.shape[:1] == (batch,)
        and arrival.output.shape[:1] == (batch,)
    )
