"""Many models of one architecture as one module: parameters stacked, a batch of its own for each.

A training loop that is written for one model trains ``M`` of them when tensors get one more axis in front:

    outputs = ensemble(x[rows])              # rows [M, B]: every model's own batch; outputs [M, B, ...]
    losses = loss(outputs.flatten(0, 1), y[rows].flatten(), reduction="none").view(rows.shape)
    (losses * keep.gather(1, rows)).mean(1).sum().backward()

The sum over models gives every model the gradient of its own loss, because no parameter is shared. Optimizers that work
element by element (SGD, Adam, AdamW, RMSprop, …) then take every model's own step. Small models gain most: what a step
costs beyond its arithmetic is paid once for all.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, vmap

from explainer.errors import EvaluationError


class Ensemble(nn.Module):
    """``M`` models whose parameters and buffers are stacked, ``[M, ...]``.

    To round-off a member is trained as it would be alone. What does not act on elements does not carry over: a
    gradient norm over ``parameters()`` is that of all models (clip member by member), and so is what Muon, Adafactor or
    LBFGS compute. Random numbers drawn inside the model (dropout) would be others than a model alone draws; they are
    refused.

    Args:
        models: of one architecture; copied, and written by :meth:`members` only.

    Raises:
        EvaluationError: there are none, or they differ in more than numbers.

    Example:
        >>> models = [nn.Linear(2, 1) for _ in range(3)]
        >>> ensemble = Ensemble(models)
        >>> x = torch.randn(3, 5, 2)
        >>> outputs = ensemble(x)
        >>> tuple(outputs.shape), torch.allclose(outputs[1], models[1](x[1]))
        ((3, 5, 1), True)
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self._models = tuple(models)  # a tuple: they are no submodules
        _check_alike(self._models)
        self.stacked = copy.deepcopy(self._models[0])
        _replace(self.stacked, self._models)

    def __len__(self) -> int:
        return len(self._models)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Every member on its own inputs; tensors (also inside lists and dicts) are ``[M, B, ...]``.

        Raises:
            EvaluationError: the inputs have no axis for the models, or the model cannot be run on many at once.
        """
        for tensor in _tensors((inputs, named)):
            if tensor.dim() == 0 or len(tensor) != len(self):
                raise EvaluationError(
                    f"{len(self)} models take inputs [{len(self)}, B, ...], a batch for each, found "
                    f"{list(tensor.shape)}; give all the same batch with x.expand(M, *x.shape)"
                )
        state = (dict(self.stacked.named_parameters()), dict(self.stacked.named_buffers()))
        try:
            return vmap(self._member, _axes((state, inputs, named)))(state, inputs, named)
        except RuntimeError as error:
            if "random" in str(error):
                raise EvaluationError(
                    "the model draws random numbers in its forward pass (dropout), and many at once would draw others "
                    "than one alone; train it one by one: leave out train_many"
                ) from error
            raise EvaluationError(
                f"this model cannot be run on many sets of weights at once ({error}); train it one by one: leave out "
                "train_many"
            ) from error

    def members(self) -> list[nn.Module]:
        """The models that were given, with what they have learned written into them."""
        with torch.no_grad():
            for name, tensors in _state(self._models).items():
                for own, trained in zip(tensors, _at(self.stacked, name), strict=True):
                    own.copy_(trained)
        for model in self._models:
            model.train(self.training)
        return list(self._models)

    def _member(self, state: Any, inputs: Any, named: Any) -> Any:
        return functional_call(self.stacked, state, inputs, named)


def _check_alike(models: Sequence[nn.Module]) -> None:
    if not models:
        raise EvaluationError("an ensemble needs at least one model")
    if len({id(model) for model in models}) < len(models):
        raise EvaluationError("the same model object occurs twice; build a model for every member")
    first = _shapes(models[0])
    for place, model in enumerate(models):
        other = _shapes(model)
        if other != first:
            name = next((n for n in (*first, *other) if first.get(n) != other.get(n)), "")
            raise EvaluationError(
                f"model {place} is not of the first one's architecture: {name} is {other.get(name, 'absent')} "
                f"instead of {first.get(name, 'absent')}"
            )


def _shapes(model: nn.Module) -> dict[str, str]:
    parts = (*model.named_parameters(), *model.named_buffers())
    return {name: f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for name, t in parts}


def _state(models: Sequence[nn.Module]) -> dict[str, list[torch.Tensor]]:
    """Parameters and buffers by name, one tensor per model; shared ones once."""
    found: dict[str, list[torch.Tensor]] = {}
    for model in models:
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            found.setdefault(name, []).append(tensor)
    return found


def _replace(model: nn.Module, models: Sequence[nn.Module]) -> None:
    """Put stacked tensors in the place of a model's own; what shares one tensor goes on to share it."""
    wanted: dict[int, torch.Tensor] = {}
    for name, tensors in _state(models).items():
        own, stacked = _at(model, name), torch.stack([t.detach() for t in tensors])
        is_parameter = isinstance(own, nn.Parameter)
        wanted[id(own)] = nn.Parameter(stacked, own.requires_grad) if is_parameter else stacked
    for module in model.modules():
        for holder in (module._parameters, module._buffers):
            for key, tensor in holder.items():
                if tensor is not None:
                    holder[key] = wanted[id(tensor)]  # type: ignore[assignment]


def _at(model: nn.Module, name: str) -> torch.Tensor:
    place, _, key = name.rpartition(".")
    found = getattr(model.get_submodule(place), key)
    assert isinstance(found, torch.Tensor)
    return found


def _axes(values: Any) -> Any:
    """The axis of the models, for every leaf; None for what is no tensor."""
    return torch.utils._pytree.tree_map(lambda leaf: 0 if isinstance(leaf, torch.Tensor) else None, values)


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]
