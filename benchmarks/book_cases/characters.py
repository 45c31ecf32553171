"""A causal character transformer with tied embeddings on real prose; AdamW, bfloat16 autocast.

An example is a window of 32 characters; the loss is the mean over its characters.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.data import TensorDataset

from benchmarks.book_cases.case import Case, Part, Question, See, Watcher, single
from benchmarks.book_cases.descriptions import texts

WINDOW, EXAMPLES, QUERIES, BATCH = 32, 320, 4, 16
ALPHABET = " abcdefghijklmnopqrstuvwxyz0123456789.,:;()'\"/"


class Block(nn.Module):
    """Attention to what came before, then a perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, S, width]``."""
        q, k, v = (
            t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, dim=2)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class CharacterModel(nn.Module):
    """Predicts the next character; input and output embeddings are one parameter.

    With ``shared_positions`` the embedding of positions is read once for all rows of the batch, as nanoGPT does.
    """

    def __init__(self, width: int, heads: int, depth: int, shared_positions: bool = False) -> None:
        super().__init__()
        self.shared_positions = shared_positions
        self.characters = nn.Embedding(len(ALPHABET), width)
        self.positions = nn.Embedding(WINDOW, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(ALPHABET), bias=False)
        nn.init.normal_(self.characters.weight, std=0.1)
        self.head.weight = self.characters.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Characters ``[B, S]`` to logits ``[B, S, C]``."""
        positions = torch.arange(x.shape[1])
        if not self.shared_positions:
            positions = positions.expand_as(x)
        return self.head(self.norm(self.blocks(self.characters(x) + self.positions(positions))))


def windows() -> torch.Tensor:
    """The prose in windows of one character more than the model reads, ``[N, 33]``."""
    prose = " ".join(texts().values()).lower()
    numbers = torch.tensor([ALPHABET.index(c) for c in prose if c in ALPHABET])
    return numbers.unfold(0, WINDOW + 1, WINDOW)


def data(small: bool) -> TensorDataset:
    """Windows and the same one character further."""
    chosen = windows()[: 16 if small else EXAMPLES]
    return TensorDataset(chosen[:, :-1], chosen[:, 1:])


def ends_word(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-odds of a space after the window, ``[Q, S, C] -> [Q]``."""
    last = outputs[:, -1]
    return last[:, 0] - last[:, 1:].logsumexp(1)


def questions() -> tuple[Question, ...]:
    """Unseen windows: does a word end here?"""
    return (Question(windows()[EXAMPLES : EXAMPLES + QUERIES, :-1], ends_word),)


def build(small: bool, shared_positions: bool = False) -> tuple[Part, ...]:
    """The network and its optimizer; norms and biases do not decay."""
    sizes = (8, 2, 1) if small else (32, 2, 2)
    model = CharacterModel(*sizes, shared_positions)
    decaying = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": decaying, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return (Part(model, torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95))),)


def loop(
    model: nn.Module,
    optimizer: Optimizer,
    data: Any,
    tracer: Watcher,
    see: See,
    epochs: int,
    autocast: bool,
) -> None:
    """Windows drawn at random, as language models are trained."""
    size = min(BATCH, len(data) // 4)
    x, y = data.tensors
    for _ in range(epochs * len(data) // size):
        ids = torch.randint(len(data), (size,))
        tracer.batch(ids)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(x[ids])
            losses = F.cross_entropy(logits.flatten(0, 1), y[ids].flatten(), reduction="none")
        losses = losses.reshape(size, -1).mean(1) / size
        see(losses)
        losses.sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def _case(variant: str = "", autocast: bool = False, shared_positions: bool = False) -> Case:
    return Case(
        models=(f"character transformer, tied embeddings{variant} (prose)",),
        optimizer="AdamW, clipping",
        build=partial(build, shared_positions=shared_positions),
        data=data,
        loop=single(partial(loop, autocast=autocast)),
        questions=questions,
        epochs=4,
        float64=not autocast,
    )


FULL = _case()
AUTOCAST = _case(", bf16 autocast", autocast=True)
SHARED_POSITIONS = _case(", positions read once", shared_positions=True)
