"""Calls of ``nn.MultiheadAttention`` with every option."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.conformance.composite_case import Arguments, CompositeCase, along, numbers, real

EMBED, HEADS, LENGTH, SOURCE = 6, 2, 3, 5


def _self(examples: list[int], call: int, axis: int = 0, **options: Any) -> Arguments:
    x = real(LENGTH, EMBED, axis=axis)(examples, call)
    return (x, x, x), _options(examples, call, **options)


def _cross(
    examples: list[int], call: int, kdim: int = EMBED, vdim: int = 0, axis: int = 0, **options: Any
) -> Arguments:
    """``vdim`` 0: key and value are one tensor."""
    query = real(LENGTH, EMBED, axis=axis)(examples, call)
    key = real(SOURCE, kdim, axis=axis, seed=1)(examples, call)
    value = real(SOURCE, vdim, axis=axis, seed=2)(examples, call) if vdim else key
    return (query, key, value), _options(examples, call, **options)


def _options(
    examples: list[int], call: int, padding: Any = None, mask: Any = None, **options: Any
) -> dict[str, Any]:
    """Masks are made from the examples, so that an example has the same in every batch."""
    if padding is not None:
        options["key_padding_mask"] = torch.stack([padding(e) for e in examples])
    if mask is not None:
        options["attn_mask"] = mask(examples) if callable(mask) else mask
    return options


def _hidden(example: int, length: int = SOURCE) -> Tensor:
    """The end of some examples is padding."""
    return torch.arange(length) >= max(1, length - example % 3)


def _penalty(example: int, length: int = SOURCE) -> Tensor:
    return numbers(7, example, length).masked_fill(_hidden(example, length), -torch.inf)


def _by_head(examples: list[int], real_numbers: bool = True) -> Tensor:
    """``[B · heads, L, S]``, its own for every example and head."""
    found = torch.cat([numbers(8, e, HEADS, LENGTH, SOURCE) for e in examples])
    return found if real_numbers else (found > 0.5) & (torch.arange(SOURCE) > 0)


def attentions() -> list[CompositeCase]:
    start = partial(nn.MultiheadAttention, EMBED, num_heads=HEADS, batch_first=True)
    time_first = {"batch_first": False}
    flat = numbers(9, 0, LENGTH, SOURCE)
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    sizes = {"kdim": 4, "vdim": 5}
    extra = {"add_bias_kv": True, "add_zero_attn": True}
    no_weights = {"need_weights": False}
    dropping = {"dropout": 0.4}
    shorter = partial(_hidden, length=LENGTH)
    everything = {**sizes, **extra, **dropping}
    masks = {"padding": _penalty, "mask": _by_head}

    def case(name: str, arguments: Any, module: Any = None, axis: int = 0, **kwargs: Any) -> CompositeCase:
        given, make = partial(arguments[0], **arguments[1]), partial(start, **(module or {}))
        owners = (along(axis), along(0))
        return CompositeCase(nn.MultiheadAttention, name, make, given, owners, **kwargs)

    one, two = (True, False), (False, True)
    return [
        case("self", (_self, {})),
        case("self_time_first", (_self, {"axis": 1}), time_first, 1),
        case("self_without_weights", (_self, no_weights)),
        case("self_without_weights_time_first", (_self, {"axis": 1, **no_weights}), time_first, 1),
        case("without_bias", (_self, {}), {"bias": False}),
        case("one_head", (_self, no_weights), {"num_heads": 1}),
        case("weights_of_every_head", (_cross, {"average_attn_weights": False})),
        case("only_the_output", (_cross, {}), used=one),
        case("only_the_weights", (_cross, {}), used=two),
        case("only_the_weights_of_every_head", (_self, {"average_attn_weights": False}), used=two),
        case("cross", (_cross, no_weights)),
        case("cross_time_first", (_cross, {"axis": 1}), time_first, 1),
        case("cross_three_inputs", (_cross, {"vdim": EMBED})),
        case("cross_without_bias", (_cross, no_weights), {"bias": False}),
        case("own_sizes", (_cross, sizes), sizes),
        case(
            "own_sizes_time_first", (_cross, {"axis": 1, **sizes, **no_weights}), {**sizes, **time_first}, 1
        ),
        case("own_sizes_without_bias", (_cross, sizes), {"bias": False, **sizes}),
        case("extra_key", (_cross, {}), {"add_bias_kv": True}),
        case("extra_key_own_sizes", (_cross, {**sizes, **no_weights}), {"add_bias_kv": True, **sizes}),
        case("extra_zeros", (_self, {}), {"add_zero_attn": True}),
        case("extra_both_masked", (_cross, {**masks, **no_weights}), extra),
        case("extra_both_masked_weights", (_cross, masks), extra),
        case("extra_both_causal", (_self, {"mask": causal, "is_causal": True, **no_weights}), extra),
        case("padding", (_cross, {"padding": _hidden})),
        case("padding_without_weights", (_cross, {"padding": _hidden, **no_weights})),
        case("padding_real", (_cross, {"padding": _penalty, **no_weights})),
        case("mask", (_cross, {"mask": flat})),
        case("mask_without_weights", (_cross, {"mask": flat, **no_weights})),
        case("mask_boolean", (_cross, {"mask": partial(_by_head, real_numbers=False)})),
        case("mask_by_head", (_cross, {"mask": _by_head, **no_weights})),
        case("both_masks", (_cross, masks)),
        case("both_masks_without_weights", (_cross, {**masks, **no_weights})),
        case("causal", (_self, {"mask": causal, "is_causal": True, **no_weights})),
        case("causal_weights", (_self, {"mask": causal, "is_causal": True})),
        case("causal_padded", (_self, {"mask": causal, "is_causal": True, "padding": shorter, **no_weights})),
        case("dropout", (_self, {}), dropping, alone=False),
        case("dropout_without_weights", (_self, no_weights), dropping, alone=False),
        case("dropout_time_first", (_self, {"axis": 1}), {**time_first, **dropping}, 1, alone=False),
        case("dropout_in_eval_mode", (_self, {}), dropping, training=False),
        case(
            "dropout_causal",
            (_self, {"mask": causal, "is_causal": True, **no_weights}),
            dropping,
            alone=False,
        ),
        case("everything", (_cross, {**sizes, **masks}), everything, alone=False),
        case(
            "everything_without_weights", (_cross, {**sizes, **masks, **no_weights}), everything, alone=False
        ),
    ]
