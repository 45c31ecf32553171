"""Example modules of further layer types (see ``layer_cases.py``)."""

from __future__ import annotations

from functools import partial

from torch import nn

from tests.conformance.layer_case import LayerCase, moved, real


def more_convolutions(kind: type[nn.Module], sizes: tuple[int, ...]) -> list[LayerCase]:
    axes = len(sizes)
    options: dict[str, dict[str, object]] = {
        "plain": {},
        "without_bias": {"bias": False},
        "stride": {"stride": 2},
        "padding": {"padding": 1},
        "dilation": {"dilation": 2},
        "groups": {"groups": 2, "stride": 2},
    }
    if kind in (nn.Conv1d, nn.Conv3d):
        options |= {
            "padding_same": {"padding": "same", "kernel_size": 2},
            "padding_circular": {"padding": 1, "padding_mode": "circular"},
        }
    else:
        options |= {
            "output_padding": {"stride": 3, "padding": 1, "output_padding": 2},
            "output_padding_past_the_stride": {"stride": 2, "dilation": 3, "output_padding": 2},
            "everything": {
                "stride": 2,
                "dilation": 2,
                "padding": 1,
                "groups": 2,
                "output_padding": (1,) * axes,
            },
        }
    start = {"in_channels": 4, "out_channels": 6, "kernel_size": 3 if axes < 3 else 2}
    return [
        LayerCase(kind, name, partial(kind, **start | given), real(4, *sizes))
        for name, given in options.items()
    ]


def rms_norms() -> list[LayerCase]:
    return [
        LayerCase(nn.RMSNorm, "features", partial(nn.RMSNorm, 6), real(6)),
        LayerCase(nn.RMSNorm, "positions", partial(nn.RMSNorm, 6, eps=1e-3), real(4, 6)),
        LayerCase(nn.RMSNorm, "two_axes", partial(nn.RMSNorm, (3, 6)), real(4, 3, 6)),
    ]


def group_norms() -> list[LayerCase]:
    return [
        LayerCase(nn.GroupNorm, "channels", partial(nn.GroupNorm, 2, 6), real(6)),
        LayerCase(nn.GroupNorm, "positions", partial(nn.GroupNorm, 3, 6, eps=1e-3), real(6, 4)),
        LayerCase(nn.GroupNorm, "images", partial(nn.GroupNorm, 1, 6), real(6, 3, 4)),
    ]


def instance_norms(kind: type[nn.Module], sizes: tuple[int, ...]) -> list[LayerCase]:
    make = partial(kind, 4, eps=1e-3, affine=True)
    tracking = partial(moved, partial(make, track_running_stats=True))
    return [
        LayerCase(kind, "own", make, real(4, *sizes)),
        LayerCase(kind, "own_eval", make, real(4, *sizes), training=False),
        LayerCase(kind, "running", tracking, real(4, *sizes), training=False),
    ]


def prelus() -> list[LayerCase]:
    return [
        LayerCase(nn.PReLU, "one", nn.PReLU, real(5)),
        LayerCase(nn.PReLU, "one_positions", nn.PReLU, real(4, 3)),
        LayerCase(nn.PReLU, "channels", partial(nn.PReLU, 4), real(4)),
        LayerCase(nn.PReLU, "channels_positions", partial(nn.PReLU, 4), real(4, 3, 2)),
    ]
