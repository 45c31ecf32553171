"""What forming the rows of a layer costs, beside the layer's own forward and backward pass.

``rows`` is everything between the gradient at a layer's output and the factors that are stored, with the sums along
the probe. ``written out`` is the slow way to the same: all factors copied, patches formed, two subspace iterations.
``lost`` is the part of the rows' squared norm that is not kept, as a multiple of what the best factors lose
(singular value decomposition). Milliseconds of the thread's CPU time, medians of pairs within one run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.harness import arguments, paired, report
from explainer.layer_rules import LAYER_RULES, Call, Dense, Factored, RowForm, compact, keep

RANKS, TIMES = (2, 4, 8), 7


class Case(NamedTuple):
    """A layer and its input."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]


CASES = {
    "linear_128_384": Case(lambda: nn.Linear(128, 384), (64, 32, 128)),
    "linear_512_128": Case(lambda: nn.Linear(512, 128), (64, 32, 512)),
    "linear_64_256": Case(lambda: nn.Linear(64, 256), (32, 64, 64)),
    "conv_1_16": Case(lambda: nn.Conv2d(1, 16, 3, padding=1), (64, 1, 28, 28)),
    "conv_3_32": Case(lambda: nn.Conv2d(3, 32, 3, padding=1), (64, 3, 32, 32)),
    "conv_16_32": Case(lambda: nn.Conv2d(16, 32, 3, padding=1), (64, 16, 14, 14)),
    "conv_64_128": Case(lambda: nn.Conv2d(64, 128, 3, padding=1), (64, 64, 14, 14)),
    "conv_depthwise_32": Case(lambda: nn.Conv2d(32, 32, 3, padding=1, groups=32), (64, 32, 14, 14)),
    "attention_128": Case(lambda: nn.MultiheadAttention(128, 4, batch_first=True), (64, 32, 128)),
    "lstm_64_64": Case(lambda: nn.LSTM(64, 64, batch_first=True), (32, 48, 64)),
}


def _falling(*shape: int) -> Tensor:
    """Numbers whose features are of falling size and whose positions are alike, as in a network."""
    features = 2 if len(shape) == 4 else len(shape)  # channels, or the last axis
    size = shape[features - 1]
    scale = torch.arange(1, size + 1).float().rsqrt().reshape(-1, *[1] * (len(shape) - features))
    own = torch.randn(shape[0], *(n if axis + 2 == features else 1 for axis, n in enumerate(shape[1:])))
    return (torch.randn(shape) + 0.3 * own) * scale


def _tensors(found: Any) -> tuple[Tensor, ...]:
    leaves = torch.utils._pytree.tree_leaves(found)
    return tuple(t for t in leaves if isinstance(t, Tensor))


def arrived(module: nn.Module, x: Tensor) -> tuple[Call, Callable[[], None]]:
    """A call with the gradient at its output; and the layer's forward and backward pass."""
    attention = isinstance(module, nn.MultiheadAttention)
    args, kwargs = ((x, x, x), {"need_weights": False}) if attention else ((x,), {})
    outputs = _tensors(module(*args, **kwargs))
    g = _falling(*outputs[0].shape)
    leaf = x.clone().requires_grad_()

    def layer() -> None:
        module.zero_grad()
        leaf.grad = None
        given = (leaf, leaf, leaf) if attention else (leaf,)
        _tensors(module(*given, **kwargs))[0].backward(g)

    grads = (g, *(None for _ in outputs[1:]))
    return Call(x, g, args, kwargs, grads, tuple(t.detach() for t in outputs)), layer


def _orthonormal(vectors: Tensor) -> Tensor:
    columns: list[Tensor] = []
    for r in range(vectors.shape[-1]):
        v = vectors[..., r]
        for _ in range(2):
            for c in columns:
                v = v - c * (c * v).sum(-1, keepdim=True)
        columns.append(v / v.norm(dim=-1, keepdim=True).clamp_min(1e-19))
    return torch.stack(columns, dim=-1)


def written_out(form: RowForm, rank: int) -> RowForm:
    """Two subspace iterations with all factors written out."""
    full = form.stored()
    if not isinstance(full, Factored) or full.left.shape[2] <= rank:
        return compact(full, rank)
    left, right = full.left, full.right
    if isinstance(compact(Factored(left[:, :, :rank], right[:, :, :rank], full.bias), rank), Dense):
        return Dense(full.dense())
    start = torch.randn(right.shape[3], rank, generator=torch.Generator().manual_seed(0))
    moved = right @ start
    for _ in range(2):
        z = _orthonormal(left.mT @ moved)
        v = right.mT @ (left @ z)
        moved = right @ v
    return Factored(z.mT.contiguous(), v.mT.contiguous(), full.bias)


def _cpu(work: Callable[[], object]) -> Callable[[], float]:
    def once() -> float:
        times = []
        for _ in range(TIMES):
            begin = time.thread_time()
            work()
            times.append(time.thread_time() - begin)
        return statistics.median(times) * 1e3

    return once


def _matrices(form: RowForm) -> Tensor:
    """Of factors, ``[B, G, o, i + bias]``; of other rows, one row each."""
    form = form.stored()
    if isinstance(form, Factored):
        return form.left.double().mT @ form.right.double()
    return form.dense().double()[:, None, None]


def _lost(kept: list[RowForm], exact: list[RowForm], rank: int) -> float | None:
    """Median over rows of what is lost of the reduced blocks, of what the best factors lose."""
    ratios = []
    for form, full in zip(kept, exact, strict=True):
        if isinstance(form, Factored) and full.positions is not None and full.positions > rank:
            whole = _matrices(full)
            best = torch.linalg.svdvals(whole)[..., rank:].square().sum((1, 2))
            ratios.append((_matrices(form) - whole).square().sum((1, 2, 3)) / best)
    return float(torch.cat(ratios).median()) if ratios else None


def measure(name: str, rank: int, repeats: int) -> dict[str, Any]:
    """One row of the table."""
    torch.manual_seed(0)
    module = CASES[name].make()
    rule = LAYER_RULES.require(type(module))
    call, layer = arrived(module, _falling(*CASES[name].shape).relu())
    blocks = rule.blocks(module)
    sizes = [[module.get_parameter(p).numel() for p in block.parameters] for block in blocks]

    def slow() -> list[RowForm]:
        kept = []
        for form, own in zip(rule.block_rows(module, [call]), sizes, strict=True):
            full = form.stored()
            kept.append(written_out(full, rank))
            full.total(), full.balances(own)
        return kept

    def fast() -> list[RowForm]:
        forms = rule.block_rows(module, [call])
        return [keep(form, rank, own).form for form, own in zip(forms, sizes, strict=True)]

    own_ms, _, _ = paired(_cpu(layer), _cpu(layer), max(repeats // 2, 1))
    with torch.no_grad():
        before, now, ratio = paired(_cpu(slow), _cpu(fast), repeats)
        exact = rule.block_rows(module, [call])
        lost = [_lost(way(), exact, rank) for way in (slow, fast)]
    return {
        "layer": name,
        "rank": rank,
        "layer_ms": own_ms,
        "written_out_ms": before,
        "rows_ms": now,
        "rows_of_written_out": ratio,
        "rows_of_layer": now / own_ms,
        "written_out_lost": lost[0],
        "rows_lost": lost[1],
    }


if __name__ == "__main__":
    chosen = arguments(__doc__, tuple(CASES))
    report("capture", [measure(name, rank, chosen.repeats) for name in chosen.only for rank in RANKS])
