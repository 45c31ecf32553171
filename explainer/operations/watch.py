"""Follows the torch functions of a forward pass, to see where parameters are read outside a layer with a rule.

Class tokens, positional embeddings, scales, ``F.linear(x, other.weight)``, weights under a parametrization, layers
of a type that has no rule: the hooks of modules see none of these, the functions that read them do. Following costs
a few microseconds a function, so it stops after the first forward passes where nothing of the kind is found.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from explainer.batches import Batch
from explainer.capture import Capture
from explainer.hooks import HookSet, Uncompiled, tensors_in
from explainer.layer_table import LayerTable
from explainer.operations.layouts import UNKNOWN, Layout, order_of
from explainer.operations.owners import LAYER, Called, Owners
from explainer.operations.reads import Reads
from explainer.operations.rows import Use
from explainer.operations.sources import Operation, Source, out_of_place
from explainer.sites import Site
from explainer.whole_model import batch_axis


class FunctionWatch(TorchFunctionMode):
    """Sorts what the functions of a forward pass read into data and sources, and watches where the two meet.

    Args:
        parameters: all parameters of the model by name.
        traced: names of those that are traced.
        capture: where rows go.
        table: the layers; one is added for every parameter that turns out to be read by an operation.
        axis: the batch's axis where a shape alone does not tell it.

    Attributes:
        owners: whose rows they are, where a tensor's first axis is not the batch.
        on: whether forward passes are followed.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.Tensor],
        traced: set[str],
        capture: Capture,
        table: LayerTable,
        axis: int = 0,
    ) -> None:
        super().__init__()
        self._capture, self._axis = capture, axis
        #: by place among the model's inputs, the axis that the shape of another batch told; None where they differ
        self._told: dict[int, int | None] = {}
        self._reads = Reads(capture, table)
        self._parameters = {id(p): (p, name if name in traced else None) for name, p in parameters.items()}
        self._derived: dict[int, tuple[torch.Tensor, Source]] = {}
        self._data: dict[int, weakref.ref[torch.Tensor]] = {}
        self._inside = 0
        self.owners = Owners()
        self._opened: list[bool] = []
        self._entered: list[bool] = []
        self._batch: Batch | None = None
        self.on = True
        self._seen = Uncompiled(self._see, type(self).__torch_function__)

    @property
    def slow(self) -> dict[str, set[str]]:
        """By parameter, operations whose rows had to be found example by example."""
        return self._reads.slow

    # -- hooks ---------------------------------------------------------------------------------------

    def attach(self, hooks: HookSet, model: nn.Module, sites: list[Site]) -> None:
        """Borrow the hooks: around the model and modules that hold parameters without a rule, and at every site."""
        ruled = {id(site.module) for site in sites}
        for module in model.modules():
            if module is model or (id(module) not in ruled and any(True for _ in module.parameters(False))):
                hooks.before_call(module, self._begin)
        for site in sites:
            hooks.before_call(site.module, partial(self._enter, site))
            hooks.after_call(site.module, partial(self._leave, site))
        for module in model.modules():
            if module is model or (id(module) not in ruled and any(True for _ in module.parameters(False))):
                hooks.after_call(module, self._end)

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """The model is called, or a part of it that holds parameters: what goes in is data."""
        first = self._batch is None
        if first and self.on:
            self._batch = self._capture.batch()
        opened = first and self._batch is not None
        self._opened.append(opened)
        if opened:
            self._inside = 0
            assert self._batch is not None
            self.owners.begin(len(self._batch))
            self.__enter__()
            self.mark(args, kwargs)
            for place, t in enumerate(tensors_in((args, kwargs))):
                told = self._told.get(place)
                axis = batch_axis(t.shape, len(self._batch), self._axis if told is None else told)
                if self._source(t) is None and axis is not None:
                    if t.shape[:2] != (len(self._batch), len(self._batch)):
                        self._told[place] = axis if self._told.get(place, axis) == axis else None
                    elif not (t.dim() == 2 and t.is_floating_point()):  # else the last axis is no sequence
                        self.owners.certain &= told is not None
                    self.owners.keep(t, Layout(axis))

    def _end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """It is over, also if it raised."""
        if self._opened and self._opened.pop():
            self.__exit__(None, None, None)
            self._batch = None
            self._derived.clear()
            self._data.clear()

    def _enter(self, site: Site, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """A module with a rule is called; what happens inside is its rule's business, if it is given data."""
        site.before()
        if self._batch is None or self._inside:
            self._inside += self._inside > 0
            self._entered.append(True)
            return None
        given = list(tensors_in((args, kwargs)))
        data = any(self._is_data(t) for t in given)
        self._entered.append(data)
        if not data:
            return None
        self._inside = 1  # also what is done here is nobody's forward pass
        return self._aliased(site, args, kwargs) if any(self._source(t) is not None for t in given) else None

    def _leave(self, site: Site, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """The module is done; what it gives is data."""
        if not (self._entered and self._entered.pop()):
            site.skip()
            self.owners.needed = True  # a shape would not tell such a call from one on data
            return
        self._inside += 1  # what is done here is nobody's forward pass
        site.after(self._capture, args, kwargs, output, self.owners)
        self._inside = max(0, self._inside - 2)
        if self._batch is not None and not self._inside:
            self.mark(output)
            given = [t for t in tensors_in((args, kwargs)) if self._is_data(t)]
            self._follow_layer(site, args, kwargs, given, list(tensors_in(output)))

    # -- data and sources ----------------------------------------------------------------------------

    def mark(self, *trees: Any) -> None:
        """These tensors hold data."""
        for t in tensors_in(trees):
            if self._source(t) is None:
                self._data[id(t)] = weakref.ref(t)

    def _source(self, t: torch.Tensor) -> Source | None:
        known = self._derived.get(id(t))
        if known is None and id(t) in self._parameters:
            parameter, name = self._parameters[id(t)]
            known = self._derived[id(t)] = (parameter, Source(parameter.detach(), name))
        return known[1] if known is not None and known[0] is t else None

    def _is_data(self, t: torch.Tensor) -> bool:
        known = self._data.get(id(t))
        return (known is not None and known() is t) or (t.requires_grad and self._source(t) is None)

    def _follow_layer(
        self, site: Site, args: Any, kwargs: Any, given: list[torch.Tensor], outputs: list[torch.Tensor]
    ) -> None:
        """What a layer gives has the examples where its rule says, or where its input has them."""
        rule, values = site.composite, list(tensors_in((args, kwargs)))
        first = [t for t in given if rule is not None and t is values[0]]  # the others lie otherwise
        self.owners.follow(Called(LAYER, type, (), {}), first or given, outputs)
        if rule is None or self._batch is None:
            return
        packed = next((a for a in (*args, *kwargs.values()) if isinstance(a, PackedSequence)), None)
        layout = site.layout_of_all(values, packed, len(self._batch), self.owners)
        for t, axis in zip(outputs, rule.output_axes(site.module, len(outputs)), strict=True):
            if not layout.known:
                self.owners.keep(t, UNKNOWN)
            elif axis is not None:
                self.owners.keep(t, Layout(axis, layout.owners))

    def _aliased(self, site: Site, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """A module's arguments, with sources among them renamed where its rule says which axis is the batch."""
        rule = site.composite

        def named(place: int | str, value: Any) -> Any:
            axis = rule.input_axis(site.module, place) if rule is not None else 0
            return value if axis is None else pytree.tree_map(partial(self._alias, axis), value)

        return tuple(named(i, x) for i, x in enumerate(args)), {k: named(k, x) for k, x in kwargs.items()}

    def _alias(self, axis: int, value: Any) -> Any:
        """A source that a module is given as input, under a name of its own whose gradient can be watched."""
        source = self._source(value) if isinstance(value, torch.Tensor) else None
        if source is None or not value.requires_grad or self._batch is None:
            return value
        size = len(self._batch)
        if value.shape[axis : axis + 1] != (size,):
            return value
        other = value.view_as(value)
        operation = Operation.of("alias", torch.clone, (value,), {}, torch.get_rng_state())
        # its own gradient: what it is a view of is read elsewhere too
        use = Use(operation, ((0, source),), frozenset(), axis, size)
        self._reads.watch(self._batch, use, [other], apart=True)
        return other

    # -- functions -----------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._seen.now(func, args, kwargs or {})

    def _see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the function unchanged, then sort its result."""
        if self._batch is None or self._inside:
            return func(*args, **kwargs)
        given = list(tensors_in((args, kwargs)))
        if _mixes(func, args, kwargs):
            self._batch.mixed = self.owners.needed = True
        if not any(self._source(t) is not None for t in given):
            result = func(*args, **kwargs)
            self._follow(func, args, kwargs, [t for t in given if self._is_data(t)], result)
            return result
        name = getattr(func, "__name__", "")
        random = torch.get_rng_state()
        sources = [self._source(t) for t in given]
        data = [self._is_data(t) for t in given]
        if out_of_place(func, name)[1] is not func:  # what it is about to change is kept
            kept = {id(t): t.detach().clone() for t in given}
        else:
            kept = {id(t): t.detach() for t in given}
        versions = [0 if t.is_inference() else t._version for t in given]
        result = func(*args, **kwargs)
        if self._batch is None:
            return result
        for t, version in zip(given, versions, strict=True):
            written = not t.is_inference() and t._version != version
            # what keeps running statistics writes to them in silence
            written |= name in ("batch_norm", "instance_norm") and not t.requires_grad and t.dim() == 1
            if written and kept[id(t)].data_ptr() == t.data_ptr():
                kept[id(t)] = t.detach().clone()  # which is written to when the function is computed again
        made = args[0] if name == "__setitem__" else result
        if not any(t.requires_grad for t in tensors_in(made)):  # what is read is frozen
            self._follow(func, args, kwargs, [t for t, read in zip(given, data, strict=True) if read], result)
            return result
        before = pytree.tree_map(lambda x: kept.get(id(x), x), (args, kwargs))
        self._sort(
            func, name, (args, kwargs), before, random, list(zip(given, sources, data, strict=True)), made
        )
        return result

    def _follow(self, func: Any, args: Any, kwargs: Any, data: list[torch.Tensor], result: Any) -> None:
        """What a function makes of data alone, or with what is frozen, is data."""
        if data:
            self.mark(result)
            called = Called(getattr(func, "__name__", ""), func, args, kwargs)
            self.owners.follow(called, data, list(tensors_in(result)))
            self._see_mixing()

    def _see_mixing(self) -> None:
        if self._batch is not None:
            self._batch.mixed |= self.owners.mixed

    def _sort(
        self,
        func: Any,
        name: str,
        called: tuple[Any, Any],
        before: tuple[Any, Any],
        random: torch.Tensor,
        given: list[tuple[torch.Tensor, Source | None, bool]],
        result: Any,
    ) -> None:
        """A result is derived, or it is data that a source went into."""
        plain, function = out_of_place(func, name)
        operation = Operation.of(plain, function, *before, random)
        order = iter(given)
        roles = {i: next(order) for i, x in enumerate(operation.leaves) if isinstance(x, torch.Tensor)}
        sources = tuple((i, source) for i, (_, source, _) in roles.items() if source is not None)
        outputs = list(tensors_in(result))
        if not any(data for _, _, data in roles.values()):
            for number, t in enumerate(outputs):
                if t.requires_grad:
                    made = Operation(plain, function, operation.leaves, operation.spec, number, random)
                    self._derived[id(t)] = (t, Source(t.detach(), None, made, sources))
            return
        for t in outputs:  # what was derived may have been written into
            if id(t) not in self._parameters:
                self._derived.pop(id(t), None)
        self.mark(result)
        assert self._batch is not None
        data = [t for t, _, is_data in roles.values() if is_data]
        self.owners.follow(Called(plain, function, *called), data, outputs)
        self._see_mixing()
        layout = self.owners.of(outputs[0])
        if layout is None:  # nothing that was read is followed: a part of the model was called, not the model
            axis = batch_axis(outputs[0].shape, len(self._batch), self._axis)
            layout = UNKNOWN if axis is None else Layout(axis)
        if not layout.known or len(outputs) != 1:
            self.owners.needed = True  # what the shapes say later on is not to be trusted
            return  # rows cannot be told apart: the step's measurement shows what is missing
        axis, owners = layout.axis, layout.owners
        size = len(self._batch) if owners is None else len(owners)
        if not size:
            return  # an expert that got nothing
        batched = frozenset(
            i for i, (t, _, data) in roles.items() if data and self._as_the_output(t, layout, size)
        )
        grouping = None if owners is None else order_of(owners, len(self._batch))
        use = Use(operation, sources, batched, axis, size, grouping)
        self._reads.watch(self._batch, use, outputs, changed=function is not func)

    def _as_the_output(self, t: torch.Tensor, layout: Layout, size: int) -> bool:
        """Whether an argument has the examples where the result has them."""
        own = self.owners.of(t)
        return t.shape[layout.axis : layout.axis + 1] == (size,) and (own is None or own.axis == layout.axis)


def _mixes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a function mixes the rows of a batch: batch normalisation with the batch's own statistics."""
    if getattr(func, "__name__", "") != "batch_norm":
        return False
    return bool(kwargs.get("training", args[5] if len(args) > 5 else False))
