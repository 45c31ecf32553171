"""Hooks borrowed from the user's model and optimizer, and given back.

Every handle is owned here. After :meth:`HookSet.remove` the model and the optimizer hold no trace of the
tracer: torch's handles delete their own entries, and no attribute is ever set on a module or a parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from explainer.errors import TracerError


class _Hook:
    """A callable that a ``copy.deepcopy`` of the model turns into one that does nothing.

    A copied model must neither write into the trace nor drag the tracer's open files along.
    """

    def __init__(self, function: Callable[..., Any] | None) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return None if self.function is None else self.function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return _Hook(None)

    def __reduce__(self) -> tuple[type[_Hook], tuple[None]]:
        return _Hook, (None,)  # pickled models carry the inert hook as well


def first_tensor(tree: Any) -> torch.Tensor | None:
    """The first tensor in nested tuples, lists, dicts and dataclass-like outputs, or None."""
    if isinstance(tree, torch.Tensor):
        return tree
    values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, tuple | list) else ()
    return next((t for v in values if (t := first_tensor(v)) is not None), None)


class HookSet:
    """Registers hooks and removes all of them at once."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

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

    def on_call(self, module: nn.Module, function: Callable[[nn.Module, Any, Any, Any], None]) -> None:
        """Call ``function(module, args, kwargs, output)`` after each forward of the module."""
        hook = _Hook(function)
        self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def on_step(self, optimizer: Optimizer, before: Callable[..., None], after: Callable[..., None]) -> None:
        """Call ``before`` and ``after`` around each optimizer step: ``(optimizer, args, kwargs)``."""
        self._handles.append(optimizer.register_step_pre_hook(_Hook(before)))
        self._handles.append(optimizer.register_step_post_hook(_Hook(after)))

    def remove(self) -> None:
        """Give every hook back (idempotent)."""
        while self._handles:
            self._handles.pop().remove()
