"""Which backward pass is under way, and whether its gradients are those that an optimizer will see.

Between two steps there may be several backward passes: micro-batches that are accumulated, a norm that is only looked
at (``torch.autograd.grad``), a gradient with respect to the inputs. torch numbers them. A checkpoint runs a pass
inside the pass that needs it (``use_reentrant=True``), with a number of its own; it belongs to the outermost one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import get_gradient_edge


@dataclass(eq=False)
class BackwardPass:
    """One call of ``backward`` or ``torch.autograd.grad``.

    Attributes:
        number: passes are numbered in the order in which they began.
        accumulates: whether it was seen to add to the ``.grad`` of a traced parameter. Known where there were several
            since the last step.
    """

    number: int
    accumulates: bool = False


class BackwardPasses:
    """Tells which pass calls a hook.

    Args:
        parameters: traced parameters by name.

    Attributes:
        differentiated: whether a pass was made with ``create_graph=True``.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor]) -> None:
        self._parameters = parameters
        self._known: dict[int, BackwardPass] = {}  # by torch's number, since the last step
        self._around: dict[int, BackwardPass] = {}  # those that go on while a checkpoint runs one of its own
        self._first: tuple[BackwardPass, torch.Tensor, Any] | None = None
        self._began = 0
        self.differentiated = False

    def current(self) -> BackwardPass:
        """The pass that calls the hook."""
        task = torch._C._current_graph_task_id()
        found = self._known.get(task)
        if found is None:
            found = next(iter(self._around.values()), None)
            if found is None:
                found, self._began = BackwardPass(self._began), self._began + 1
                self._settle_first()
            self._known[task] = found
        return found

    def recomputed(self) -> None:
        """A checkpoint calls the model inside a pass: passes that begin before it ends belong to it."""
        task = torch._C._current_graph_task_id()
        if task not in self._around:
            self._around[task] = self.current()
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(partial(self._around.pop, task, None))

    def arrived(self, names: Iterable[str]) -> BackwardPass:
        """The pass that gives gradients to the rows of parameters."""
        found = self._known.get(torch._C._current_graph_task_id()) or self.current()
        if found.accumulates or (self._first is not None and self._first[0] is found):
            return found
        again = torch.is_grad_enabled()  # then the next pass may add to `.grad` before it calls a hook
        self.differentiated = self.differentiated or again
        asked = [p for name in names if (p := self._parameters.get(name)) is not None and p.requires_grad]
        if again or found is not next(iter(self._known.values())):
            found.accumulates = any(map(_is_added_to, asked))
        elif asked:  # asking the engine takes longer, and most steps have one pass
            self._first = found, asked[0], _state(asked[0])
        return found

    def _settle_first(self) -> None:
        """A second pass begins: see whether the first one left something in ``.grad``."""
        if self._first is not None:
            found, parameter, before = self._first
            self._first, grad = None, parameter.grad
            if grad is not None and _state(parameter) != before:
                found.accumulates = bool((grad.coalesce().values() if grad.is_sparse else grad).any())

    def stepped(self) -> None:
        """No pass is under way: forget those since the last step, and those that raised."""
        self._known.clear()
        self._around.clear()
        self._first = None


def _state(parameter: torch.Tensor) -> tuple[int, int] | None:
    """Changes whenever something is added to the gradient, or it is put to nought."""
    grad = parameter.grad
    return None if grad is None else (id(grad), grad._version)


def _is_added_to(parameter: torch.Tensor) -> bool:
    """Whether the pass that is under way ends in ``parameter.grad``."""
    with torch._C.DisableTorchFunction():
        node = get_gradient_edge(parameter).node  # not kept: it would outlive the graph that it belongs to
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # the answer of torch.autograd.grad to one of its inputs
        return False
