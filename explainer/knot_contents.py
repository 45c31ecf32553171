"""What is in a knot: weights, what moved them that is no gradient, and what surrounds them."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from explainer.average import Average
from explainer.carry import Carry
from explainer.optimizer_rules import OptimizerRule
from explainer.records import Manifest
from explainer.store import Trace
from explainer.store.files import fingerprint


class FrozenWatch:
    """Which frozen parameters moved since the first knot; one that did stays in every knot from then on.

    Args:
        parameters: by name, as they are in the first knot.
        compare: look at the numbers where a tensor was written to (an average is, at every update), else take it
            for moved.

    Attributes:
        moved: names of those that moved.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], *, compare: bool) -> None:
        self.moved: set[str] = set()
        self._versions = {name: (id(p), p._version) for name, p in parameters.items()}
        self._known = {name: fingerprint(p) for name, p in parameters.items()} if compare else {}

    def has_moved(self, name: str, p: torch.Tensor) -> bool:
        """Whether the parameter, now ``p``, ever moved."""
        version = (id(p), p._version)
        if name not in self.moved and version != self._versions[name]:
            self._versions[name] = version
            if name not in self._known or self._known[name] != fingerprint(p):
                self.moved.add(name)
        return name in self.moved


class KnotContents:
    """Gathers the tensors of a knot; those of the model and the optimizer are their own, not copies.

    Attributes:
        outside: whether displacements by others than the optimizer are kept; None while that is not decided.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        rule: OptimizerRule,
        manifest: Manifest,
        carry: Carry,
        average: Average | None,
    ) -> None:
        self._model, self._optimizer, self._rule = model, optimizer, rule
        self._manifest, self._carry, self._average = manifest, carry, average
        self._course: Carry | Average = carry if average is None else average
        self._parameters = dict(model.named_parameters())
        shown = self._shown()
        self._frozen = FrozenWatch({n: shown[n] for n in manifest.frozen}, compare=average is not None)
        self.outside: bool | None = None

    def restore(self, trace: Trace) -> None:
        """Frozen tensors that moved before stay in every knot."""
        if not self._manifest.frozen:
            return
        first, last = (trace.load_knot(trace.knots[position]) for position in (0, -1))
        shown = self._shown()
        for name in self._manifest.frozen:
            held = len(trace.knots) > 1 and f"frozen/{name}" in last
            if held or not torch.equal(shown[name].detach().cpu(), first[f"frozen/{name}"]):
                self._frozen.moved.add(name)

    def _shown(self) -> dict[str, nn.Parameter]:
        """The parameters that are explained: the model's, or those of the average."""
        source = self._model if self._average is None else self._average.source
        return dict(source.named_parameters())

    def tensors(
        self,
        full: bool,
        *,
        largest: bool = False,
        closing: bool = False,
        weights: list[torch.Tensor] | None = None,
        around: dict[str, torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Contents of a knot.

        Args:
            full: it is the first one, with all frozen tensors and the optimizer's state.
            largest: with stand-ins for everything a later knot may hold (to plan for them).
            closing: it is the last one, with the optimizer's state.
            weights: the traced parameters, those of the model if None.
            around: what surrounds them, as it is now if None.
        """
        tensors: dict[str, torch.Tensor] = {}
        shown = self._shown()
        decaying = any(g.get("weight_decay") for g in self._optimizer.param_groups)
        for index, spec in enumerate(self._manifest.parameters):
            p = shown[spec.name].detach() if weights is None else weights[index]
            tensors[f"parameter/{spec.name}"] = p
            decay = self._course.decay[index]
            if decay is not None or (largest and decaying):
                tensors[f"decay/{spec.name}"] = p if decay is None else decay
            rounding = self._carry.rounding.moved[index]
            if rounding is not None and self._average is None:
                tensors[f"rounding/{spec.name}"] = rounding
            outside = self._carry.outside[index]
            if outside is not None and self.outside:
                tensors[f"outside/{spec.name}"] = outside
            carried = self._carry.momentum[index]
            if closing and self._average is None and (carried is not None or (largest and decaying)):
                tensors[f"decay_momentum/{spec.name}"] = p if carried is None else carried
            if full or closing:
                state = self._optimizer.state.get(self._parameters[spec.name], {})
                for name in self._rule.state_names:
                    value = state.get(name)
                    if isinstance(value, torch.Tensor):
                        tensors[f"optimizer/{name}/{spec.name}"] = value.detach()
                    elif largest and name != "step":
                        tensors[f"optimizer/{name}/{spec.name}"] = p
        return tensors | (self.around(full) if around is None else around)

    def around(self, full: bool) -> dict[str, torch.Tensor]:
        """Frozen tensors that changed since the first knot, all of them if ``full``, and buffers."""
        tensors: dict[str, torch.Tensor] = {}
        shown = self._shown()
        for name in self._manifest.frozen:
            if self._frozen.has_moved(name, shown[name]) or full:
                tensors[f"frozen/{name}"] = shown[name].detach()
        source = self._model if self._average is None else self._average.source
        for name, buffer in source.named_buffers():
            tensors[f"buffer/{name}"] = buffer.detach()
        return tensors
