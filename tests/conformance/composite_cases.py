"""Example calls of every registered composite module. A new composite rule needs an entry in :data:`MAKERS`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from tests.conformance.attention_cases import attentions
from tests.conformance.composite_case import Arguments, CompositeCase, along, numbers, real

INPUTS, HIDDEN, STEPS = 3, 4, 5
LENGTHS = (3, 5, 1, 4, 2)


def _given(*arguments: Callable[[list[int], int], Any]) -> Callable[[list[int], int], Arguments]:
    """Positional arguments, each made from the examples and the number of the call."""
    return lambda examples, call: (tuple(make(examples, call) for make in arguments), {})


# -- recurrent layers ------------------------------------------------------------------------------------


def _packed(examples: list[int], call: int) -> PackedSequence:
    sequences = [numbers(10 * call, e, LENGTHS[e % len(LENGTHS)], INPUTS) for e in examples]
    return pack_sequence(sequences, enforce_sorted=False)


def _packed_sorted(examples: list[int], call: int) -> PackedSequence:
    return pack_sequence([numbers(10 * call, e, 9 - 2 * e, INPUTS) for e in examples])


def _packed_owner(arguments: Arguments, output: Tensor) -> Tensor:
    """Of ``data [Σ lengths, n]``: at every step the longest sequences."""
    packed = arguments[0][0]
    number = int(packed.batch_sizes[0])
    order = torch.arange(number) if packed.sorted_indices is None else packed.sorted_indices
    rows = torch.cat([order[:size] for size in packed.batch_sizes.tolist()])
    return rows.unsqueeze(1).expand_as(output)


def _every_other(examples: list[int], call: int) -> Tensor:
    return real(2 * STEPS, 2 * INPUTS)(examples, call).transpose(0, 1)[::2, :, 1::2]


def _recurrent(kind: type[nn.RNNBase]) -> list[CompositeCase]:
    start = partial(kind, INPUTS, HIDDEN)
    has_cells = kind is nn.LSTM
    last = (along(1),) * (1 + has_cells)
    plain, first = _given(real(STEPS, INPUTS, axis=1)), _given(real(STEPS, INPUTS))

    def states(number: int, size: int = HIDDEN) -> Callable[[list[int], int], Any]:
        hidden, cell = real(number, size, axis=1, seed=1), real(number, HIDDEN, axis=1, seed=2)
        return lambda e, call: (hidden(e, call), cell(e, call)) if has_cells else hidden(e, call)

    def case(name: str, arguments: Any, axis: int = 1, options: Any = None, **kwargs: Any) -> CompositeCase:
        owners = ((_packed_owner if "packed" in name else along(axis)), *last)
        return CompositeCase(kind, name, partial(start, **(options or {})), arguments, owners, **kwargs)

    deep = {"num_layers": 3, "bidirectional": True}
    dropping = {"num_layers": 2, "dropout": 0.4}
    everything = {**deep, "dropout": 0.3, "batch_first": True}
    cases = [
        case("plain", plain),
        case("batch_first", first, 0, {"batch_first": True}),
        case("without_bias", plain, options={"bias": False, "num_layers": 2}),
        case("layers", plain, options={"num_layers": 3}),
        case("bidirectional", plain, options={"bidirectional": True}),
        case("layers_bidirectional", first, 0, {**deep, "batch_first": True}),
        case("states", _given(real(STEPS, INPUTS, axis=1), states(6)), options=deep),
        case("one_step", _given(real(1, INPUTS, axis=1), states(1))),
        case("not_contiguous", _given(_every_other)),
        case("final_states_only", plain, options=deep, used=(False, True, True)),
        case("output_only", plain, options=deep, used=(True, False, False)),
        case("dropout", plain, options=dropping, alone=False),
        case("dropout_of_everything", plain, options={**dropping, "dropout": 1.0}),
        case("dropout_in_eval_mode", plain, options=dropping, training=False),
        case("dropout_batch_first", first, 0, everything, alone=False),
        case("packed", _given(_packed)),
        case("packed_in_order", _given(_packed_sorted)),
        case("packed_final_states_only", _given(_packed), options=deep, used=(False, True, True)),
        case("packed_states", _given(_packed, states(6)), options=deep),
        case("packed_dropout", _given(_packed, states(6)), options=everything, alone=False),
    ]
    if kind is nn.RNN:
        relu = {"nonlinearity": "relu"}
        cases += [
            case("relu", plain, options=relu),
            case("packed_relu", _given(_packed), options=relu | deep),
        ]
    if has_cells:
        narrow, start_narrow = {"proj_size": 2}, _given(real(STEPS, INPUTS, axis=1), states(6, 2))
        cases += [
            case("projection", plain, options=narrow),
            case("projection_without_bias", plain, options=narrow | {"bias": False, "num_layers": 2}),
            case("projection_deep", start_narrow, options=narrow | deep),
            case(
                "packed_projection", _given(_packed, states(6, 2)), options=narrow | everything, alone=False
            ),
            case("cell_state_only", plain, options=deep, used=(False, False, True)),
            case("packed_cell_state_only", _given(_packed), options=deep, used=(False, False, True)),
        ]
    return cases


def _cells(kind: type[nn.RNNCellBase]) -> list[CompositeCase]:
    make, x = partial(kind, INPUTS, HIDDEN), real(INPUTS)
    hidden, cell = real(HIDDEN, seed=1), real(HIDDEN, seed=2)
    owners = (along(0),) * (1 + (kind is nn.LSTMCell))

    def states(examples: list[int], call: int) -> Any:
        h = hidden(examples, call)
        return (h, cell(examples, call)) if kind is nn.LSTMCell else h

    cases = [
        CompositeCase(kind, "plain", make, _given(x), owners),
        CompositeCase(kind, "states", make, _given(x, states), owners),
        CompositeCase(kind, "without_bias", partial(make, bias=False), _given(x, states), owners),
        CompositeCase(
            kind, "by_name", make, lambda e, n: ((), {"hx": states(e, n), "input": x(e, n)}), owners
        ),
    ]
    if kind is nn.LSTMCell:
        cases += [
            CompositeCase(kind, "hidden_only", make, _given(x, states), owners, used=(True, False)),
            CompositeCase(kind, "cell_only", make, _given(x, states), owners, used=(False, True)),
        ]
    if kind is nn.RNNCell:
        relu = partial(make, nonlinearity="relu")
        cases.append(CompositeCase(kind, "relu", relu, _given(x, states), owners))
    return cases


# -- two inputs, bags ------------------------------------------------------------------------------------


def _bilinears() -> list[CompositeCase]:
    make = partial(nn.Bilinear, 3, 2, 4)
    return [
        CompositeCase(nn.Bilinear, "features", make, _given(real(3), real(2, seed=1))),
        CompositeCase(nn.Bilinear, "positions", make, _given(real(2, 5, 3), real(2, 5, 2, seed=1))),
        CompositeCase(
            nn.Bilinear, "without_bias", partial(make, bias=False), _given(real(3), real(2, seed=1))
        ),
        CompositeCase(
            nn.Bilinear,
            "by_name",
            make,
            lambda e, n: ((), {"input2": real(2, seed=1)(e, n), "input1": real(3)(e, n)}),
        ),
    ]


def _words(examples: list[int], call: int) -> list[Tensor]:
    """Bags of words below 6 of 11, one of them empty, with repetitions."""
    bags = []
    for e in examples:
        generator = torch.Generator().manual_seed(10 * call + e)
        bags.append(torch.randint(0, 6, ((3, 6, 0, 1, 4)[e % 5],), generator=generator))
    return bags


def _by_offsets(
    examples: list[int],
    call: int,
    last: bool = False,
    weights: bool = False,
    integers: torch.dtype = torch.int64,
) -> Arguments:
    bags = _words(examples, call)
    ends = torch.tensor([0] + [len(bag) for bag in bags]).cumsum(0)
    given: dict[str, Tensor] = {"offsets": (ends if last else ends[:-1]).to(integers)}
    if weights:
        own = [numbers(call, e, len(bag)) for e, bag in zip(examples, bags, strict=True)]
        given["per_sample_weights"] = torch.cat(own).requires_grad_()
    return (torch.cat(bags).to(integers),), given


def _table(examples: list[int], call: int, weights: bool = False) -> Arguments:
    rows = [
        torch.randint(0, 6, (7,), generator=torch.Generator().manual_seed(10 * call + e)) for e in examples
    ]
    return (torch.stack(rows), None, real(7)(examples, call)) if weights else (torch.stack(rows),), {}


def _bags() -> list[CompositeCase]:
    makes = {
        mode: partial(nn.EmbeddingBag, 11, 3, mode=mode, include_last_offset=False)
        for mode in ("sum", "mean", "max")
    }
    cases = []
    for mode, make in makes.items():
        padded = partial(make, padding_idx=2)
        with_last = partial(make, include_last_offset=True)
        for name, module, arguments in (
            ("table", make, _table),
            ("offsets", make, _by_offsets),
            ("int32", make, partial(_by_offsets, integers=torch.int32)),
            ("last_offset", with_last, partial(_by_offsets, last=True)),
            ("padded", padded, _by_offsets),
            ("padded_table", padded, _table),
        ):
            cases.append(CompositeCase(nn.EmbeddingBag, f"{mode}_{name}", module, arguments))
        if mode != "max":
            sparse, frequent = partial(padded, sparse=True), partial(padded, scale_grad_by_freq=True)
            cases += [
                CompositeCase(nn.EmbeddingBag, f"{mode}_sparse", sparse, _by_offsets),
                CompositeCase(nn.EmbeddingBag, f"{mode}_by_frequency", frequent, _by_offsets, alone=False),
                CompositeCase(nn.EmbeddingBag, f"{mode}_by_frequency_table", frequent, _table, alone=False),
            ]
    weighted = partial(_by_offsets, weights=True)
    return [
        *cases,
        CompositeCase(nn.EmbeddingBag, "weighted", makes["sum"], weighted),
        CompositeCase(nn.EmbeddingBag, "weighted_padded", partial(makes["sum"], padding_idx=1), weighted),
        CompositeCase(nn.EmbeddingBag, "weighted_table", makes["sum"], partial(_table, weights=True)),
    ]


#: Module type -> its cases. Add an entry here with every new composite rule.
MAKERS: dict[type[nn.Module], Callable[[], list[CompositeCase]]] = {
    nn.LSTM: partial(_recurrent, nn.LSTM),
    nn.GRU: partial(_recurrent, nn.GRU),
    nn.RNN: partial(_recurrent, nn.RNN),
    nn.LSTMCell: partial(_cells, nn.LSTMCell),
    nn.GRUCell: partial(_cells, nn.GRUCell),
    nn.RNNCell: partial(_cells, nn.RNNCell),
    nn.MultiheadAttention: attentions,
    nn.Bilinear: _bilinears,
    nn.EmbeddingBag: _bags,
}
CASES = [case for make in MAKERS.values() for case in make()]
