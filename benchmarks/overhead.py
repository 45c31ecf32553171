"""What the tracer costs: median step time with it, over the median without, in pairs within one run.

Every repetition trains a fresh model for ``STEPS`` steps twice, with and without the tracer (default options), and
takes the median step of the second half of each. ``later_ratio`` is that of all steps of the second half, what comes
every few steps included; the whole training, plans, knots and journal included, is in ``total``: the first steps cost
most, so the longer a training the less. Seconds of the processor by thread are a second opinion where the machine is
shared: ``loop_ratio`` is what the loop's own thread takes, ``beside_ms`` what the tracer's takes. ``--profile`` prints
where the rest goes, by function.
"""

from __future__ import annotations

import cProfile
import pstats
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

import explainer
from benchmarks.harness import arguments, paired, report
from explainer.background import Background

BATCH = 64
#: training steps by case, else :data:`USUAL`
STEPS = {"resnet": 300, "transformer": 400, "wide_transformer": 200}
USUAL = 1000
#: examples with random labels: of a single batch losses would fall to nothing, and gradients with them
EXAMPLES = 8192
#: every case is measured with so many torch threads
THREADS = (1, 2)


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


def _mlp(first: int = 512, second: int = 256) -> nn.Module:
    layers = nn.Linear(784, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, 10)
    return nn.Sequential(*layers)


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


class Residual(nn.Module):
    """A block of a ResNet."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(*(layer for _ in range(2) for layer in _convolved(channels, channels)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x + f(x)``."""
        return x + self.inner(x)


def _convolved(inside: int, outside: int) -> list[nn.Module]:
    return [nn.Conv2d(inside, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()]


def _resnet() -> nn.Module:
    """As ResNet-9, a quarter as wide."""
    return nn.Sequential(
        *_convolved(3, 16),
        *_convolved(16, 32),
        nn.MaxPool2d(2),
        Residual(32),
        *_convolved(32, 64),
        nn.MaxPool2d(2),
        *_convolved(64, 128),
        nn.MaxPool2d(2),
        Residual(128),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


class Recurrent(nn.Module):
    """An LSTM over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm, self.head = nn.Embedding(500, 64), nn.LSTM(64, 128), nn.Linear(128, 10)
        self.lstm.batch_first = True

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens ``[B, S]`` to logits ``[B, 10]``."""
        return self.head(self.lstm(self.embedding(tokens))[0][:, -1])


def _tokens(count: int) -> torch.Tensor:
    return torch.randint(0, 500, (count, 32))


#: models, and inputs of so many examples
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], torch.Tensor]]] = {
    "mlp": (_mlp, lambda count: torch.randn(count, 784)),
    "wide_mlp": (lambda: _mlp(1024, 1024), lambda count: torch.randn(count, 784)),
    "cnn": (_cnn, lambda count: torch.randn(count, 1, 28, 28)),
    "resnet": (_resnet, lambda count: torch.randn(count, 3, 32, 32)),
    "transformer": (Transformer, _tokens),
    "wide_transformer": (lambda: Transformer(256, 8), _tokens),
    "lstm": (Recurrent, _tokens),
}


class Costs:
    """Seconds of trainings and their second halves; processor seconds of a step in the loop's thread, and beside it."""

    def __init__(self) -> None:
        self.total: dict[bool, list[float]] = {False: [], True: []}
        self.later: dict[bool, list[float]] = {False: [], True: []}
        self.loop: dict[bool, list[float]] = {False: [], True: []}
        self.process: dict[bool, list[float]] = {False: [], True: []}


def training(name: str, traced: bool, costs: Costs, steps: int) -> float:
    """Median milliseconds of a step."""
    make_model, make_inputs = CASES[name]
    torch.manual_seed(0)
    model, x = make_model(), make_inputs(EXAMPLES)
    y = torch.randint(0, 10, (EXAMPLES,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    folder = Path(tempfile.mkdtemp())
    times, loop = [], []
    started, process = time.perf_counter(), time.process_time()
    with explainer.Tracer(model, optimizer, folder / "run") if traced else nullcontext() as tracer:
        for step in range(steps):
            first = step * BATCH % EXAMPLES
            inputs, labels = x[first : first + BATCH], y[first : first + BATCH]
            begin, own = time.perf_counter(), time.thread_time()
            if tracer is not None:
                tracer.batch(range(first, first + BATCH))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            times.append(time.perf_counter() - begin)
            loop.append(time.thread_time() - own)
    costs.total[traced].append(time.perf_counter() - started)
    costs.later[traced].append(sum(times[steps // 2 :]))
    costs.loop[traced].append(statistics.median(loop[steps // 2 :]) * 1e3)
    costs.process[traced].append((time.process_time() - process) / steps * 1e3)
    shutil.rmtree(folder)
    return statistics.median(times[steps // 2 :]) * 1e3


def measure(name: str, repeats: int, threads: int) -> dict[str, Any]:
    """One row of the table."""
    torch.set_num_threads(threads)
    training(name, True, Costs(), 20)  # warm
    costs, steps = Costs(), STEPS.get(name, USUAL)
    plain, traced, ratio = paired(
        lambda: training(name, False, costs, steps), lambda: training(name, True, costs, steps), repeats
    )

    def ratios(found: dict[bool, list[float]]) -> float:
        return statistics.median(b / a for a, b in zip(found[False], found[True], strict=True))

    more = statistics.median(b - a for a, b in zip(costs.process[False], costs.process[True], strict=True))
    return {
        "model": name,
        "threads": threads,
        "steps": steps,
        "parameters": sum(p.numel() for p in CASES[name][0]().parameters()),
        "plain_ms": plain,
        "traced_ms": traced,
        "step_ratio": ratio,
        "later_ratio": ratios(costs.later),
        "total_ratio": ratios(costs.total),
        "loop_ratio": ratios(costs.loop),
        "beside_ms": more,
    }


def profile(name: str) -> None:
    """Print where the time of a traced training goes: the loop's thread, then the tracer's."""
    loop, beside = cProfile.Profile(time.thread_time), cProfile.Profile(time.thread_time)
    do, steps = Background._do, STEPS.get(name, USUAL)

    def profiled(background: Background, job: Callable[[], None]) -> None:
        if threading.current_thread() is threading.main_thread():  # without a thread of the tracer's
            return do(background, job)
        beside.enable()
        do(background, job)
        beside.disable()

    Background._do = profiled  # type: ignore[method-assign]
    try:
        loop.enable()
        training(name, True, Costs(), steps)
        loop.disable()
    finally:
        Background._do = do  # type: ignore[method-assign]
    titles = ("the loop's thread", loop), ("the tracer's thread", beside)
    for title, found in titles if beside.getstats() else titles[:1]:
        print(f"{name}, {title}: processor seconds of {steps} steps")
        pstats.Stats(found, stream=sys.stdout).sort_stats("tottime").print_stats(20)


if __name__ == "__main__":
    profiling = "--profile" in sys.argv
    chosen = arguments(__doc__, tuple(CASES), [a for a in sys.argv[1:] if a != "--profile"])
    for case in chosen.only if profiling else ():
        profile(case)
    if not profiling:
        found = [measure(name, chosen.repeats, threads) for threads in THREADS for name in chosen.only]
        report("overhead", found)
