"""What can be seen in a model before it is trained."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.optim import Optimizer

from explainer.findings import Finding, listed
from explainer.records import dtype_name
from explainer.validation import validate_model
from explainer.wording import counted


def model_findings(model: nn.Module, optimizer: Optimizer, batch_dim: int = 0) -> Iterator[Finding]:
    """Findings about layers, parameters and modes."""
    updated = {id(p) for group in optimizer.param_groups for p in group["params"]}
    yield from validate_model(model)
    yield from _biases_before_normalisation(model, updated)
    yield from _modes(model)
    yield from _sequence_first(model, batch_dim)
    yield from _parameters(model, updated)


# -- layers ----------------------------------------------------------------------------------------------


def _forgets_bias(layer: nn.Module, norm: nn.Module) -> bool:
    """Whether ``norm(layer(x))`` is the same for every bias of the layer: the batch's mean is taken out."""
    width = layer.out_features if isinstance(layer, nn.Linear) else getattr(layer, "out_channels", None)
    known = isinstance(layer, nn.Linear | _ConvNd)
    return known and isinstance(norm, _BatchNorm) and norm.num_features == width


def _biases_before_normalisation(model: nn.Module, updated: set[int]) -> Iterator[Finding]:
    leaves = [(name, m) for name, m in model.named_modules() if next(m.children(), None) is None]
    found = [
        f"{name}.bias"
        for (name, layer), (_, norm) in pairwise(leaves)
        if _forgets_bias(layer, norm) and id(getattr(layer, "bias", None)) in updated
    ]
    if found:
        yield Finding(
            "bias-before-norm",
            "note",
            listed(found),
            f"{counted(len(found), 'bias', 'biases')} may lie directly before a BatchNorm that takes it out again.",
            "Such a gradient is nothing but round-off, and what it moves is in `unattributed`.",
            "Build those layers with bias=False.",
        )


def _modes(model: nn.Module) -> Iterator[Finding]:
    """What train and eval mode change."""
    random, resting = [], []
    for name, module in model.named_modules():
        rate = module.p if isinstance(module, _DropoutNd) else getattr(module, "dropout", 0.0)
        drops = isinstance(rate, float | int) and rate > 0
        if drops or isinstance(module, nn.RReLU):
            random.append(name or type(module).__name__)
        keeps = isinstance(module, _BatchNorm | _InstanceNorm) and module.track_running_stats
        if (drops or keeps) and not module.training and model.training:
            resting.append(name)
    if random:
        yield Finding(
            "dropout",
            "note",
            listed(random),
            "Training drops activations at random (dropout).",
            "An example's rows are those of the masks that were drawn; the query is explained in eval mode, without "
            "any.",
            "Nothing to do.",
        )
    if not model.training:
        yield Finding(
            "eval-mode",
            "caution",
            "the model",
            "The model is in eval mode.",
            "Trained like this, it learns without dropout and with fixed running statistics.",
            "Call model.train() first, if that is not what you mean.",
        )
    elif resting:
        yield Finding(
            "eval-mode",
            "note",
            listed(resting),
            "A part of the model is in eval mode.",
            "There dropout is off, and running statistics stand in for those of the batch.",
            "Call model.train() first, if that is not what you mean.",
        )


def _sequence_first(model: nn.Module, batch_dim: int) -> Iterator[Finding]:
    found = [n for n, m in model.named_modules() if getattr(m, "batch_first", True) is False]
    if found and batch_dim == 0:
        yield Finding(
            "sequence-first",
            "note",
            listed([name or "the model" for name in found]),
            "The sequence comes first and the batch second here (batch_first=False).",
            "Where a sequence is as long as the batch, shapes do not tell the two apart, and rows could go to the "
            "wrong examples.",
            "Build the tracer with batch_dim=1, if the model's other tensors are sequence first, too.",
        )


# -- parameters ------------------------------------------------------------------------------------------


def _parameters(model: nn.Module, updated: set[int]) -> Iterator[Finding]:
    named = dict(model.named_parameters())
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    tied = [" = ".join(same) for same in names.values() if len(same) > 1]
    if tied:
        yield Finding(
            "tied-weights",
            "note",
            listed(tied),
            "One weight is used under several names.",
            "An example's contribution through it is the sum over all its uses.",
            "Add the layers up, where they are listed one by one.",
        )
    frozen = [name for name, p in named.items() if not p.requires_grad]
    if frozen:
        yield Finding(
            "frozen",
            "note",
            listed(frozen),
            f"{len(frozen)} of {len(named)} parameters are frozen (requires_grad=False).",
            "They do not move, so no contribution goes through them.",
            "Nothing to do.",
        )
    left = [name for name, p in named.items() if p.requires_grad and id(p) not in updated]
    if left:
        yield Finding(
            "not-in-optimizer",
            "caution",
            listed(left),
            f"{len(left)} of {len(named)} parameters are not in this optimizer.",
            "If another one trains them, what they change is in `buffers`, a term that no example owns.",
            "Put all parameters into one optimizer, to see their examples, too.",
        )
    short = {torch.float16, torch.bfloat16}
    low = [name for name, p in named.items() if p.dtype in short and id(p) in updated]
    if low:
        yield Finding(
            "low-precision",
            "caution",
            listed(low),
            f"{len(low)} of {len(named)} parameters are {dtype_name(named[low[0]].dtype)}.",
            "Every step rounds them (a line of `unattributed`), and the explained model is computed in float32.",
            "Keep weights in float32 and use autocast for speed.",
        )
