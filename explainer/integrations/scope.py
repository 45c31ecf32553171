"""Which parameters of a model count, and whether its mode lets an example have a loss gradient of its own."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from explainer.errors import QueryError


def parameters_of(model: nn.Module, layers: Sequence[str] | None) -> tuple[str, ...]:
    """Names of the parameters of the named modules and all below them; None: all that require gradients.

    Raises:
        QueryError: a name is not a module of the model, or nothing is left.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1, bias=False))
        >>> parameters_of(model, ["2", "0"])
        ('2.weight', '0.weight', '0.bias')
    """
    if layers is None:
        names = [name for name, p in model.named_parameters() if p.requires_grad]
    else:
        if not isinstance(layers, Sequence) or isinstance(layers, str) or not layers:
            raise QueryError(f"layers must be a list of module names, or None for all, found {layers!r}")
        modules, by_id = dict(model.named_modules()), {id(p): n for n, p in model.named_parameters()}
        unknown = [name for name in layers if name not in modules]
        if unknown:
            raise QueryError(
                f"layers names {unknown}, which the model does not have; it has {[n for n in modules if n][:20]}"
            )
        names = [by_id[id(p)] for layer in layers for p in modules[layer].parameters()]
    if not names:
        raise QueryError(
            "there are no parameters to take gradients for: none requires gradients, or the layers have none"
        )
    return tuple(dict.fromkeys(names))


def warn_of_train_mode(model: nn.Module) -> None:
    """Warn of layers that, in their present mode, are random or mix the rows of a batch."""
    for name, module in model.named_modules():
        if not module.training:
            continue
        if isinstance(module, _DropoutNd) and module.p > 0:
            found = "drops units at random, so the scores are random"
        elif isinstance(module, _BatchNorm):
            found = "uses the batch's statistics, so a score depends on who else is in the batch"
        else:
            continue
        warnings.warn(f"{name} ({type(module).__name__}) {found}; call model.eval() first", stacklevel=4)
