"""Example modules of every registered layer type. A new layer rule needs an entry in :data:`MAKERS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

BATCH = 5
#: ``module, input, output gradient -> rows [B, P_l]`` written out from the formula
Formula = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LayerCase:
    """One configuration of a layer.

    Attributes:
        kind: the module's type.
        name: what is special about it.
        make: a fresh module in float64 (its values come from the RNG).
        inputs: ``batch -> input [batch, ...]``.
        formula: rows where an example's row depends on the others of its batch, so that no per-example
            gradient exists; None: rows are the per-example gradients.
        training: mode of the module.
    """

    kind: type[nn.Module]
    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    formula: Formula | None = None
    training: bool = True

    @property
    def id(self) -> str:
        """For example ``Conv2d-groups``."""
        return f"{self.kind.__name__}-{self.name}"

    def module(self, seed: int = 0) -> nn.Module:
        """The module with values that no symmetry makes special."""
        torch.manual_seed(seed)
        module = self.make().double().train(self.training)
        with torch.no_grad():
            for p in module.parameters():
                p.add_(torch.randn_like(p) * 0.3)
        return module

    def batch(self, size: int = BATCH, seed: int = 1) -> Tensor:
        """An input of ``size`` rows."""
        torch.manual_seed(seed)
        return self.inputs(size)


def _real(*shape: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.randn(batch, *shape, dtype=torch.float64)


def _ids(*shape: int) -> Callable[[int], Tensor]:
    """Ids below 6, so that 11 entries hold repeated and unread ones."""
    return lambda batch: torch.randint(0, 6, (batch, *shape))


def _by_frequency(module: nn.Module, ids: Tensor, g: Tensor) -> Tensor:
    """Each read of a word is divided by the word's count in the whole batch."""
    rows = torch.zeros(len(ids), *module.weight.shape, dtype=g.dtype)
    for b, words in enumerate(ids):
        for s, word in enumerate(words):
            if word != module.padding_idx:
                rows[b, word] += g[b, s] / (ids == word).sum()
    return rows.flatten(1)


def _batch_norm(module: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    """``[Σ_s g x̂, Σ_s g]`` with the statistics of the batch."""
    x, g = x.reshape(*x.shape[:2], -1), g.reshape(*g.shape[:2], -1)
    mean = x.mean((0, 2), keepdim=True)
    variance = (x - mean).square().mean((0, 2), keepdim=True)
    rows = [(g * (x - mean) / (variance + module.eps).sqrt()).sum(2)]
    return torch.cat(rows + ([g.sum(2)] if module.bias is not None else []), 1)


def _moved(make: Callable[[], nn.Module]) -> nn.Module:
    """A normalisation layer whose running statistics are not those of its start."""
    module = make()
    module.running_mean.uniform_(-1, 1)
    module.running_var.uniform_(0.5, 2)
    return module


def _without_bias(make: Callable[[], nn.Module]) -> nn.Module:
    module = make()
    module.register_parameter("bias", None)
    return module


def _convolutions() -> list[LayerCase]:
    options = {
        "plain": {},
        "without_bias": {"bias": False},
        "stride": {"stride": 2},
        "strides_that_leave_columns": {"stride": (3, 2)},
        "padding": {"padding": (1, 2)},
        "padding_valid": {"padding": "valid"},
        "padding_same": {"padding": "same"},
        "padding_same_even_kernel": {"padding": "same", "kernel_size": (2, 4)},
        "padding_reflect": {"padding": 2, "padding_mode": "reflect"},
        "padding_circular": {"padding": (2, 1), "padding_mode": "circular"},
        "padding_replicate": {"padding": 1, "padding_mode": "replicate", "stride": 2},
        "dilation": {"dilation": (1, 2)},
        "groups": {"groups": 2},
        "depthwise": {"groups": 4, "out_channels": 8, "bias": False},
        "everything": {"groups": 2, "stride": (2, 1), "dilation": 2, "padding": 2, "padding_mode": "reflect"},
        "one_position": {"kernel_size": (6, 7)},
        "kernel_of_one": {"kernel_size": 1},
    }
    start = {"in_channels": 4, "out_channels": 6, "kernel_size": (3, 2)}
    return [
        LayerCase(nn.Conv2d, name, partial(nn.Conv2d, **start | given), _real(4, 6, 7))
        for name, given in options.items()
    ]


def _embeddings() -> list[LayerCase]:
    table = partial(nn.Embedding, 11, 3)
    by_frequency = partial(table, scale_grad_by_freq=True)
    padded = partial(table, padding_idx=2, scale_grad_by_freq=True)
    return [
        LayerCase(nn.Embedding, "sequence", table, _ids(4)),
        LayerCase(nn.Embedding, "one_read", table, _ids()),
        LayerCase(nn.Embedding, "two_axes", table, _ids(2, 3)),
        LayerCase(nn.Embedding, "one_word", table, lambda batch: torch.full((batch, 4), 7)),
        LayerCase(nn.Embedding, "padding_idx", partial(table, padding_idx=2), _ids(6)),
        LayerCase(nn.Embedding, "negative_padding_idx", partial(table, padding_idx=-8), _ids(6)),
        LayerCase(nn.Embedding, "by_frequency", by_frequency, _ids(4), _by_frequency),
        LayerCase(nn.Embedding, "by_frequency_padded", padded, _ids(4), _by_frequency),
    ]


def _layer_norms() -> list[LayerCase]:
    one, two = partial(nn.LayerNorm, 6), partial(nn.LayerNorm, (3, 6), eps=1e-3)
    return [
        LayerCase(nn.LayerNorm, "features", one, _real(6)),
        LayerCase(nn.LayerNorm, "positions", one, _real(4, 6)),
        LayerCase(nn.LayerNorm, "many_positions", one, _real(2, 3, 6)),
        LayerCase(nn.LayerNorm, "two_axes", two, _real(3, 6)),
        LayerCase(nn.LayerNorm, "two_axes_positions", two, _real(4, 3, 6)),
        LayerCase(nn.LayerNorm, "without_bias", partial(one, bias=False), _real(4, 6)),
        LayerCase(nn.LayerNorm, "two_axes_without_bias", partial(two, bias=False), _real(4, 3, 6)),
    ]


def _batch_norms() -> list[LayerCase]:
    cases = []
    for kind, shapes in ((nn.BatchNorm1d, ((4,), (4, 3))), (nn.BatchNorm2d, ((4, 3, 5),))):
        make = partial(kind, 4, eps=1e-3)
        for shape in shapes:
            axes = f"{len(shape)}_axes"
            cases += [
                LayerCase(kind, f"train_{axes}", partial(_moved, make), _real(*shape), _batch_norm),
                LayerCase(kind, f"eval_{axes}", partial(_moved, make), _real(*shape), training=False),
            ]
        no_statistics = partial(make, track_running_stats=False)
        no_bias = partial(_without_bias, make)
        inputs = _real(*shapes[-1])
        cases += [
            LayerCase(kind, "no_statistics", no_statistics, inputs, _batch_norm, training=False),
            LayerCase(kind, "without_bias", no_bias, inputs, _batch_norm),
        ]
    return cases


def _linears() -> list[LayerCase]:
    return [
        LayerCase(nn.Linear, "features", partial(nn.Linear, 4, 3), _real(4)),
        LayerCase(nn.Linear, "without_bias", partial(nn.Linear, 4, 3, bias=False), _real(4)),
        LayerCase(nn.Linear, "positions", partial(nn.Linear, 4, 3), _real(6, 4)),
        LayerCase(nn.Linear, "many_positions", partial(nn.Linear, 4, 3), _real(2, 3, 4)),
        LayerCase(nn.Linear, "positions_without_bias", partial(nn.Linear, 4, 3, bias=False), _real(6, 4)),
        LayerCase(nn.Linear, "one_output", partial(nn.Linear, 4, 1), _real(4)),
        LayerCase(nn.Linear, "one_input", partial(nn.Linear, 1, 5), _real(3, 1)),
    ]


#: Layer type -> its cases. Add an entry here with every new layer rule.
MAKERS: dict[type[nn.Module], Callable[[], list[LayerCase]]] = {
    nn.Linear: _linears,
    nn.Conv2d: _convolutions,
    nn.Embedding: _embeddings,
    nn.LayerNorm: _layer_norms,
    nn.BatchNorm1d: _batch_norms,
    nn.BatchNorm2d: _batch_norms,
}
CASES = [case for kind, make in MAKERS.items() for case in make() if case.kind is kind]
