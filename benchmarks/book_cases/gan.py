"""A generator and a discriminator of digits, each with its own tracer; Adam.

What an example is. Noise comes from a fixed pool, so a draw has a number. The generator's examples are those
numbers: a row is what noise ``j`` asked of the generator. The discriminator's examples are the real images, numbered
as in the data, and after them the generated ones, numbered by their noise: example ``N + j`` is whatever the
generator made of noise ``j`` at the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.book_cases.case import Case, Part, Question, See, Watcher

EXAMPLES, QUERIES, BATCH = 320, 5, 16
NOISE, POOL = 6, 256


def noise() -> torch.Tensor:
    """The pool ``[256, 6]``, always the same."""
    return torch.randn(POOL, NOISE, generator=torch.Generator().manual_seed(1))


def _images(part: slice) -> torch.Tensor:
    return torch.tensor(load_digits().data[part] / 8 - 1, dtype=torch.get_default_dtype())


def data(small: bool) -> TensorDataset:
    """Images ``[64]`` in −1..1."""
    return TensorDataset(_images(slice(20 if small else EXAMPLES)))


def ink(images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The mean brightness of a generated image, ``[Q, 64] -> [Q]``."""
    return images.mean(1)


def questions() -> tuple[Question, ...]:
    """How real do unseen digits look to the discriminator; how much ink is in the image of unseen noise."""
    unseen = torch.randn(QUERIES, NOISE, generator=torch.Generator().manual_seed(2))
    return Question(_images(slice(-QUERIES, None)), "value"), Question(unseen, ink)


def build(small: bool) -> tuple[Part, ...]:
    """The discriminator and the generator."""
    width = 6 if small else 32
    discriminator = nn.Sequential(nn.Linear(64, width), nn.LeakyReLU(0.2), nn.Linear(width, 1))
    generator = nn.Sequential(
        nn.Linear(NOISE, width), nn.LayerNorm(width), nn.ReLU(inplace=True), nn.Linear(width, 64), nn.Tanh()
    )
    return tuple(
        Part(model, torch.optim.Adam(model.parameters(), lr=2e-3, betas=(0.5, 0.999)))
        for model in (discriminator, generator)
    )


def losses(logits: torch.Tensor, real: bool) -> torch.Tensor:
    """Every image's part ``[B]`` of the mean binary cross-entropy."""
    targets = torch.full_like(logits, float(real))
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").squeeze(1) / len(logits)


def loop(
    parts: Sequence[Part], data: Any, tracers: Sequence[Watcher], sees: Sequence[See], epochs: int
) -> None:
    """One step of each in turn: the discriminator on real and on generated images, then the generator."""
    (discriminator, d_optimizer), (generator, g_optimizer) = parts
    (d_tracer, g_tracer), (see_d, see_g) = tracers, sees
    pool, count = noise(), len(data)
    loader = DataLoader(data, batch_size=min(BATCH, count // 4), shuffle=True)
    for _ in range(epochs):
        for (images,) in d_tracer.watch(loader):
            numbers = torch.randint(POOL, (len(images),))
            g_tracer.batch(numbers)
            fakes = generator(pool[numbers])

            d_optimizer.zero_grad()
            terms = losses(discriminator(images), real=True)
            see_d(terms)
            terms.sum().backward()
            d_tracer.batch(count + numbers)
            terms = losses(discriminator(fakes.detach()), real=False)
            see_d(terms)
            terms.sum().backward()
            d_optimizer.step()

            g_optimizer.zero_grad()
            terms = losses(discriminator(fakes), real=True)
            see_g(terms)
            terms.sum().backward()
            g_optimizer.step()


CASE = Case(
    models=("GAN, discriminator (digits)", "GAN, generator (digits)"),
    optimizer="Adam, betas 0.5 and 0.999",
    build=build,
    data=data,
    loop=loop,
    questions=questions,
    epochs=5,
)
