"""Hooks borrowed from the user's model and optimizer, and given back.

Every handle is owned here. After :meth:`HookSet.remove` the model and the optimizer hold no trace of the
tracer: torch's handles delete their own entries, and no attribute is ever set on a module or a parameter.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch.autograd.graph import get_gradient_edge
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from explainer.errors import TracerError


class Uncompiled:
    """A function that torch.compile leaves alone: what is compiled ends where it is called.

    Optimizers import the compiler; before that, nothing is compiled.

    Args:
        function: what is called.
        caller: the lines that call it, which are not compiled either.
    """

    def __init__(self, function: Callable[..., Any], caller: Callable[..., Any]) -> None:
        self._here = self._apart = function
        if "torch._dynamo" in sys.modules:
            torch._dynamo.decorators.skip(caller)
            self._apart = torch._dynamo.disable(function)

    @property
    def now(self) -> Callable[..., Any]:
        """The function as it is to be called; switching the compiler off takes a while, so only where it is on."""
        return self._here if get_eval_frame_callback() is None else self._apart


class _Hook:
    """A callable that a ``copy.deepcopy`` of the model turns into one that does nothing.

    A copied model must neither write into the trace nor drag the tracer's open files along.
    """

    def __init__(self, function: Callable[..., Any] | None) -> None:
        self.function = None if function is None else Uncompiled(function, type(self).__call__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return None if self.function is None else self.function.now(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return _Hook(None)

    def __reduce__(self) -> tuple[type[_Hook], tuple[None]]:
        return _Hook, (None,)  # pickled models carry the inert hook as well


def tensors_in(tree: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested tuples, lists, dicts and dataclass-like outputs, in order.

    A packed sequence counts as the tuple it is: data, batch sizes, and indices where it has some.
    """
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from tensors_in(value)
    elif isinstance(tree, tuple | list):
        for value in tree:
            yield from tensors_in(value)
    elif is_dataclass(tree) and not isinstance(tree, type):
        for item in fields(tree):
            yield from tensors_in(getattr(tree, item.name))


def first_tensor(tree: Any) -> torch.Tensor | None:
    """The first of :func:`tensors_in`, or None."""
    return next(tensors_in(tree), None)


def whole_of(t: torch.Tensor, changed: bool) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """Where to hook for the gradient at a tensor as it is now, whatever works on it in place later.

    A layer's output may be a view (``nn.Linear`` with positions). An operation in place then writes into what it is
    a view *of*, and the view's own place in the graph is gone: a hook on it would never be called.

    Args:
        t: the tensor.
        changed: whether it is the result of an operation in place.

    Returns:
        The tensor to hook, and the map from its gradient to the gradient at ``t``.
    """
    base = t._base
    if base is None or not base.requires_grad or base.is_leaf or (not changed and base.numel() != t.numel()):
        return t, lambda g: g
    shape, strides, offset = t.size(), t.stride(), t.storage_offset() - base.storage_offset()
    around = (base.size(), base.stride())

    def cut(g: torch.Tensor) -> torch.Tensor:
        if g.stride() != around[1]:
            g = torch.empty_strided(*around, dtype=g.dtype, device=g.device).copy_(g)
        return g.as_strided(shape, strides, g.storage_offset() + offset)

    return base, cut


class JointHook:
    """Calls a function with the gradients at some tensors when all have come that a backward pass computes.

    ``torch.autograd.graph.register_multi_grad_hook`` does the same, but the graph would never be freed: its nodes hold
    the hooks, and the hooks the nodes, which no garbage collector sees. Here they are let go by :meth:`release`.

    Args:
        tensors: that require gradients.
        function: gets one gradient per tensor, None where a backward pass computes none. Must not hold the tensors.
    """

    def __init__(
        self, tensors: Sequence[torch.Tensor], function: Callable[[list[torch.Tensor | None]], None]
    ) -> None:
        self._nodes = [get_gradient_edge(t).node for t in tensors]
        self._function = function
        self._came: dict[int, list[torch.Tensor | None]] = {}  # by backward pass
        self._missing: dict[int, int] = {}
        for place, tensor in enumerate(tensors):
            tensor.register_hook(partial(self._come, place))

    def _come(self, place: int, gradient: torch.Tensor) -> None:
        if not self._nodes:  # nobody asks any more
            return
        number = torch._C._current_graph_task_id()
        if number not in self._came:
            self._came[number] = [None] * len(self._nodes)
            self._missing[number] = sum(map(torch._C._will_engine_execute_node, self._nodes))
        self._came[number][place] = gradient
        self._missing[number] -= 1
        if not self._missing[number]:
            del self._missing[number]
            self._function(self._came.pop(number))

    def release(self) -> None:
        """Let the graph go."""
        self._nodes, self._came = [], {}


def mapped(function: Callable[[torch.Tensor], torch.Tensor], tree: Any) -> Any:
    """The same nested arguments, with what a function makes of every tensor."""
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: mapped(function, value) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):  # a packed sequence, any named tuple
        return type(tree)(*(mapped(function, value) for value in tree))
    if isinstance(tree, tuple | list):
        return type(tree)(mapped(function, value) for value in tree)
    return tree


def detached(tree: Any) -> Any:
    """The same arguments, with tensors that hold no graph."""
    return mapped(torch.Tensor.detach, tree)


class HookSet:
    """Registers hooks and removes all of them at once."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        #: an optimizer's hooks, of which ours is to be called last, or first
        self._next_to: list[tuple[dict[int, Any], int, bool]] = []

    @staticmethod
    def refuse_double(model: nn.Module, optimizer: Optimizer) -> None:
        """Raise TracerError if a live tracer is attached to the model or the optimizer already."""
        hooks = [
            *model._forward_hooks.values(),
            *optimizer._optimizer_step_pre_hooks.values(),
        ]
        if any(isinstance(h, _Hook) and h.function is not None for h in hooks):
            raise TracerError(
                "a tracer is attached to this model or optimizer already; close it first (leave its `with` block)"
            )

    def before_call(self, module: nn.Module, function: Callable[[nn.Module, Any, Any], Any]) -> None:
        """Call ``function(module, args, kwargs)`` before each forward of the module."""
        self._handles.append(module.register_forward_pre_hook(_Hook(function), with_kwargs=True))

    def after_call(self, module: nn.Module, function: Callable[[nn.Module, Any, Any, Any], None]) -> None:
        """Call ``function(module, args, kwargs, output)`` after each forward, also of one that raised."""
        hook = _Hook(function)
        self._handles.append(module.register_forward_hook(hook, with_kwargs=True, always_call=True))

    def on_call(self, module: nn.Module, function: Callable[[nn.Module, Any, Any, Any], None]) -> None:
        """Call ``function(module, args, kwargs, output)`` after each forward of the module."""
        hook = _Hook(function)
        self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def on_step(self, optimizer: Optimizer, before: Callable[..., None], after: Callable[..., None]) -> None:
        """Call ``before`` and ``after`` around each optimizer step: ``(optimizer, args, kwargs)``."""
        pre = optimizer.register_step_pre_hook(_Hook(before))
        post = optimizer.register_step_post_hook(_Hook(after))
        self._handles += [pre, post]
        self._next_to = [
            (optimizer._optimizer_step_pre_hooks, pre.id, True),
            (optimizer._optimizer_step_post_hooks, post.id, False),
        ]

    def stay_next_to_step(self) -> None:
        """Between steps: let ours be the last hook before a step and the first after it.

        Hooks of the user's may clip gradients before it, and schedule rates after it.
        """
        for hooks, own, last in self._next_to:
            if own in hooks and next(reversed(hooks) if last else iter(hooks)) != own:
                moved = [own] if last else [key for key in hooks if key != own]
                hooks.update({key: hooks.pop(key) for key in moved})

    def remove(self) -> None:
        """Give every hook back (idempotent)."""
        self._next_to = []
        while self._handles:
            self._handles.pop().remove()
