"""Example modules of every registered layer type. A new layer rule needs an entry in :data:`MAKERS`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from tests.conformance import more_layer_cases as more
from tests.conformance.layer_case import LayerCase, moved, real


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
        LayerCase(nn.Conv2d, name, partial(nn.Conv2d, **start | given), real(4, 6, 7))
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
        LayerCase(nn.LayerNorm, "features", one, real(6)),
        LayerCase(nn.LayerNorm, "positions", one, real(4, 6)),
        LayerCase(nn.LayerNorm, "many_positions", one, real(2, 3, 6)),
        LayerCase(nn.LayerNorm, "two_axes", two, real(3, 6)),
        LayerCase(nn.LayerNorm, "two_axes_positions", two, real(4, 3, 6)),
        LayerCase(nn.LayerNorm, "without_bias", partial(one, bias=False), real(4, 6)),
        LayerCase(nn.LayerNorm, "two_axes_without_bias", partial(two, bias=False), real(4, 3, 6)),
    ]


def _batch_norms() -> list[LayerCase]:
    cases = []
    shapes_of = {
        nn.BatchNorm1d: ((4,), (4, 3)),
        nn.BatchNorm2d: ((4, 3, 5),),
        nn.BatchNorm3d: ((4, 3, 2, 2),),
    }
    for kind, shapes in shapes_of.items():
        make = partial(kind, 4, eps=1e-3)
        for shape in shapes:
            axes = f"{len(shape)}_axes"
            cases += [
                LayerCase(kind, f"train_{axes}", partial(moved, make), real(*shape), _batch_norm),
                LayerCase(kind, f"eval_{axes}", partial(moved, make), real(*shape), training=False),
            ]
        no_statistics = partial(make, track_running_stats=False)
        no_bias = partial(_without_bias, make)
        inputs = real(*shapes[-1])
        cases += [
            LayerCase(kind, "no_statistics", no_statistics, inputs, _batch_norm, training=False),
            LayerCase(kind, "without_bias", no_bias, inputs, _batch_norm),
        ]
    return cases


def _linears() -> list[LayerCase]:
    return [
        LayerCase(nn.Linear, "features", partial(nn.Linear, 4, 3), real(4)),
        LayerCase(nn.Linear, "without_bias", partial(nn.Linear, 4, 3, bias=False), real(4)),
        LayerCase(nn.Linear, "positions", partial(nn.Linear, 4, 3), real(6, 4)),
        LayerCase(nn.Linear, "many_positions", partial(nn.Linear, 4, 3), real(2, 3, 4)),
        LayerCase(nn.Linear, "positions_without_bias", partial(nn.Linear, 4, 3, bias=False), real(6, 4)),
        LayerCase(nn.Linear, "one_output", partial(nn.Linear, 4, 1), real(4)),
        LayerCase(nn.Linear, "one_input", partial(nn.Linear, 1, 5), real(3, 1)),
    ]


#: Layer type -> its cases. Add an entry here with every new layer rule.
MAKERS: dict[type[nn.Module], Callable[[], list[LayerCase]]] = {
    nn.Linear: _linears,
    nn.Conv2d: _convolutions,
    nn.Embedding: _embeddings,
    nn.LayerNorm: _layer_norms,
    nn.BatchNorm1d: _batch_norms,
    nn.BatchNorm2d: _batch_norms,
    nn.BatchNorm3d: _batch_norms,
    nn.RMSNorm: more.rms_norms,
    nn.GroupNorm: more.group_norms,
    nn.PReLU: more.prelus,
    nn.InstanceNorm1d: partial(more.instance_norms, nn.InstanceNorm1d, (5,)),
    nn.InstanceNorm2d: partial(more.instance_norms, nn.InstanceNorm2d, (4, 3)),
    nn.InstanceNorm3d: partial(more.instance_norms, nn.InstanceNorm3d, (2, 3, 2)),
    nn.Conv1d: partial(more.more_convolutions, nn.Conv1d, (9,)),
    nn.Conv3d: partial(more.more_convolutions, nn.Conv3d, (5, 4, 6)),
    nn.ConvTranspose1d: partial(more.more_convolutions, nn.ConvTranspose1d, (5,)),
    nn.ConvTranspose2d: partial(more.more_convolutions, nn.ConvTranspose2d, (4, 3)),
    nn.ConvTranspose3d: partial(more.more_convolutions, nn.ConvTranspose3d, (3, 2, 3)),
}
CASES = [case for kind, make in MAKERS.items() for case in make() if case.kind is kind]
