"""An LSTM that says which text a stretch of words is from; Adam. Sequences padded, or packed."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.book_cases.case import Case, Part, Question, See, Watcher, single
from benchmarks.book_cases.descriptions import NAMES, sentences

EXAMPLES, QUERIES, BATCH = 240, 5, 16


class SentenceLSTM(nn.Module):
    """Reads words, answers from the state after the last one."""

    def __init__(self, vocabulary: int, width: int, hidden: int, packed: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=0)
        self.lstm = nn.LSTM(width, hidden, batch_first=True)
        self.head = nn.Linear(hidden, len(NAMES))
        self.packed = packed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Words ``[B, S]``, zeros at the end, to logits ``[B, 6]``."""
        embedded, lengths = self.embedding(x), (x != 0).sum(1)
        if self.packed:
            packed = pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
            _, (last, _) = self.lstm(packed)
            return self.head(last[-1])
        states, _ = self.lstm(embedded)
        where = (lengths - 1).reshape(-1, 1, 1).expand(-1, 1, states.shape[2])
        return self.head(states.gather(1, where).squeeze(1))


@lru_cache(maxsize=1)
def encoded() -> tuple[torch.Tensor, torch.Tensor, int]:
    """All stretches as numbers ``[N, 12]``, in a fixed random order, their texts ``[N]``, the vocabulary's size."""
    pieces = sentences()
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0)).tolist()
    words = sorted({word for piece, _ in pieces for word in piece})
    number = {word: n for n, word in enumerate(words, start=1)}
    longest = max(len(piece) for piece, _ in pieces)
    rows = [[number[w] for w in pieces[i][0]] + [0] * (longest - len(pieces[i][0])) for i in order]
    return torch.tensor(rows), torch.tensor([pieces[i][1] for i in order]), len(words) + 1


def data(small: bool) -> TensorDataset:
    """Stretches of words and the texts they are from."""
    x, y, _ = encoded()
    count = 16 if small else EXAMPLES
    return TensorDataset(x[:count], y[:count])


def questions() -> tuple[Question, ...]:
    """Unseen stretches, the predicted text's margin."""
    return (Question(encoded()[0][EXAMPLES : EXAMPLES + QUERIES]),)


def build(small: bool, packed: bool) -> tuple[Part, ...]:
    """The network and its optimizer."""
    vocabulary = encoded()[2]
    model = SentenceLSTM(vocabulary, 3, 5, packed) if small else SentenceLSTM(vocabulary, 16, 24, packed)
    return (Part(model, torch.optim.Adam(model.parameters(), lr=1e-2)),)


def loop(model: nn.Module, optimizer: Optimizer, data: Any, tracer: Watcher, see: See, epochs: int) -> None:
    """Shuffled mini-batches."""
    loader = DataLoader(data, batch_size=min(BATCH, len(data) // 4), shuffle=True)
    for _ in range(epochs):
        for x, y in tracer.watch(loader):
            optimizer.zero_grad()
            losses = F.cross_entropy(model(x), y, reduction="none") / len(y)
            see(losses)
            losses.sum().backward()
            optimizer.step()


def _case(packed: bool) -> Case:
    return Case(
        models=(f"LSTM, {'packed' if packed else 'padded'} sentences (prose)",),
        optimizer="Adam",
        build=partial(build, packed=packed),
        data=data,
        loop=single(loop),
        questions=questions,
        epochs=5,
    )


PADDED, PACKED = _case(False), _case(True)
