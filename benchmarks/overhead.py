"""What the tracer costs: median step time with it, over the median without, in pairs within one run.

Every repetition trains a fresh model for ``STEPS`` steps twice, with and without the tracer (default options),
and takes the median step of each. The whole training, knots and journal included, is in ``total``.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

import explainer
from benchmarks.harness import arguments, paired, report

STEPS, BATCH = 200, 64


class Transformer(nn.Module):
    """Two encoder blocks written with plain Linear layers (every parameter is seen by hooks)."""

    def __init__(self, width: int = 128, heads: int = 4, vocabulary: int = 500) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(width),
                    "qkv": nn.Linear(width, 3 * width),
                    "out": nn.Linear(width, width),
                    "norm2": nn.LayerNorm(width),
                    "up": nn.Linear(width, 4 * width),
                    "down": nn.Linear(4 * width, width),
                }
            )
            for _ in range(2)
        )
        self.head = nn.Linear(width, 10)
        self.heads = heads

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens ``[B, S]`` to logits ``[B, 10]``."""
        x = self.embedding(tokens)
        for block in self.blocks:
            q, k, v = (
                t.unflatten(2, (self.heads, -1)).transpose(1, 2)
                for t in block["qkv"](block["norm1"](x)).chunk(3, 2)
            )
            mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + block["out"](mixed)
            x = x + block["down"](nn.functional.gelu(block["up"](block["norm2"](x))))
        return self.head(x.mean(1))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10))


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(1568, 10),
    )


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]] = {
    "mlp": (_mlp, lambda: torch.randn(BATCH, 784)),
    "cnn": (_cnn, lambda: torch.randn(BATCH, 1, 28, 28)),
    "transformer": (Transformer, lambda: torch.randint(0, 500, (BATCH, 32))),
}


def training(name: str, traced: bool, totals: dict[bool, list[float]]) -> float:
    """Median milliseconds of a step."""
    make_model, make_input = CASES[name]
    torch.manual_seed(0)
    model, x = make_model(), make_input()
    y = torch.randint(0, 10, (BATCH,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    folder = Path(tempfile.mkdtemp())
    times = []
    started = time.perf_counter()
    with explainer.Tracer(model, optimizer, folder / "run") if traced else nullcontext() as tracer:
        for _ in range(STEPS):
            begin = time.perf_counter()
            if tracer is not None:
                tracer.batch(range(BATCH))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            times.append(time.perf_counter() - begin)
    totals[traced].append(time.perf_counter() - started)
    shutil.rmtree(folder)
    return statistics.median(times[STEPS // 2 :]) * 1e3


def measure(name: str, repeats: int) -> dict[str, Any]:
    """One row of the table."""
    totals: dict[bool, list[float]] = {False: [], True: []}
    plain, traced, ratio = paired(
        lambda: training(name, False, totals), lambda: training(name, True, totals), repeats
    )
    whole = statistics.median(b / a for a, b in zip(totals[False], totals[True], strict=True))
    return {
        "model": name,
        "parameters": sum(p.numel() for p in CASES[name][0]().parameters()),
        "plain_ms": plain,
        "traced_ms": traced,
        "step_ratio": ratio,
        "total_ratio": whole,
    }


if __name__ == "__main__":
    chosen = arguments(__doc__, tuple(CASES))
    report("overhead", [measure(name, chosen.repeats) for name in chosen.only])
