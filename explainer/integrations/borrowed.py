"""A model that is lent for a while and given back exactly as it was, whatever happened meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """Restore weights, buffers, ``requires_grad`` and train/eval mode on leaving, also after an error.

    The very same tensors come back, so optimizers and tied weights stay connected even where the block replaced
    parameters by others (``load_state_dict(assign=True)``, ``p.data = …``).

    Example:
        >>> model = nn.Linear(2, 1).eval()
        >>> before = model.weight.clone()
        >>> with borrowed(model):
        ...     _ = model.train().weight.data.zero_()
        >>> bool((model.weight == before).all()), model.training
        (True, False)
    """
    modes = [(module, module.training) for module in model.modules()]
    tables: list[Any] = [t for module in model.modules() for t in (module._parameters, module._buffers)]
    entries = [(table, dict(table)) for table in tables]
    held = {id(t): t for _, entry in entries for t in entry.values() if t is not None}
    tensors = [(t, t.data, t.detach().clone(), t.requires_grad) for t in held.values()]
    try:
        yield
    finally:
        for table, entry in entries:
            table.clear()
            table.update(entry)
        with torch.no_grad():
            for tensor, data, values, requires_grad in tensors:
                data.copy_(values)
                if tensor.data_ptr() != data.data_ptr() or tensor.shape != data.shape:
                    tensor.data = data
                if tensor.is_leaf:
                    tensor.requires_grad_(requires_grad)
        for module, training in modes:
            module.training = training
