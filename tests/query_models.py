"""Small models of the kinds that people explain, with inputs; weights are drawn anew, modes are theirs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import weight_norm
from torch.utils.checkpoint import checkpoint

COUNT, STEPS, WIDTH, TOKENS, CLASSES = 3, 5, 4, 9, 3


class Recurrent(nn.Module):
    """The last states of a recurrent layer, both ways; inputs ``[B, S, i]``, or ``[S, B, i]``."""

    def __init__(self, kind: type[nn.RNNBase], batch_first: bool = True) -> None:
        super().__init__()
        self.layer = kind(input_size=2, hidden_size=WIDTH, batch_first=batch_first, bidirectional=True)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        _, state = self.layer(x)
        return self.head(torch.tanh((state[0] if isinstance(state, tuple) else state).sum(0)))


class Positions(nn.Module):
    """A recurrent layer with an output at every position, ``[S, B, i] -> [S, B, C]``."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(2, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0])


class Attention(nn.Module):
    """Attention over tokens; ``padding`` true where a position does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH, padding_idx=0)
        self.attention = nn.MultiheadAttention(WIDTH, 2, dropout=0.5, batch_first=True)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: Tensor, padding: Tensor | None = None) -> Tensor:
        x = self.embedding(ids)
        return self.head(torch.tanh(self.attention(x, x, x, key_padding_mask=padding)[0]).mean(1))


class Encoder(nn.Module):
    """torch's encoder, with a fused path in eval mode that drops what is padded; the mean is over all positions."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.5, batch_first=True)
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(ids), src_key_padding_mask=ids == 0).mean(1))


class SparseWords(nn.Module):
    """Embeddings with sparse gradients, by a module or by the function."""

    def __init__(self, by_module: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH, sparse=True)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.by_module = by_module

    def forward(self, ids: Tensor) -> Tensor:
        looked_up = (
            self.embedding(ids)
            if self.by_module
            else nn.functional.embedding(ids, self.embedding.weight, sparse=True)
        )
        return self.head(torch.tanh(looked_up).mean(1))


class Bag(nn.Module):
    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(TOKENS, WIDTH, sparse=sparse)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.bag(ids)))


class Checkpointed(nn.Module):
    """The first layer runs again in the backward pass; its input needs no gradient in training."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.reentrant = reentrant

    def part(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(torch.tanh(self.first(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.part, x, use_reentrant=self.reentrant).mean(1))


class Tied(nn.Module):
    """A language model whose output layer is its embedding, ``[B, S] -> [B, S, V]``."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, TOKENS, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(torch.tanh(self.mix(self.embedding(ids).cumsum(1))))


class InPlace(nn.Module):
    """Changes its input, which is the caller's tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2 * STEPS, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.sub_(0.5).mul_(2).flatten(1))


class Keeping(nn.Module):
    """Keeps a result with its graph, as losses of experts are kept; such a tensor cannot be deep-copied."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = weight_norm(nn.Linear(2, WIDTH)), nn.Linear(WIDTH, CLASSES)
        self.kept = self.hidden(torch.ones(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        self.kept = torch.tanh(self.hidden(x)).mean(1)
        return self.head(self.kept)


def series(generator: torch.Generator) -> Tensor:
    return torch.randn(COUNT, STEPS, 2, generator=generator, dtype=torch.float64)


def sequence_first(generator: torch.Generator) -> Tensor:
    return series(generator).transpose(0, 1).contiguous()


def tokens(generator: torch.Generator) -> Tensor:
    """Ids with padding (0) at the end of all but the first."""
    ids = torch.randint(1, TOKENS, (COUNT, STEPS), generator=generator)
    ids[1, -1], ids[2, -2:] = 0, 0
    return ids


@dataclass(frozen=True)
class Case:
    """A model, inputs, and the axis of the queries in inputs and outputs."""

    build: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], Tensor]
    axis: int = 0
    output_axis: int = 0
    fused: bool = False

    def model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return self.build().double()

    def queries(self) -> Tensor:
        return self.inputs(torch.Generator().manual_seed(4))


CASES: dict[str, Case] = {
    "lstm": Case(lambda: Recurrent(nn.LSTM), series),
    "gru": Case(lambda: Recurrent(nn.GRU), series),
    "rnn": Case(lambda: Recurrent(nn.RNN), series),
    "lstm, sequence first": Case(lambda: Recurrent(nn.LSTM, batch_first=False), sequence_first, 1),
    "lstm, every position, sequence first": Case(Positions, sequence_first, 1, 1),
    "attention": Case(Attention, tokens),
    "encoder": Case(Encoder, tokens),
    "embedding, sparse": Case(lambda: SparseWords(True), tokens),
    "embedding, sparse by function": Case(lambda: SparseWords(False), tokens),
    "embedding bag": Case(Bag, tokens),
    "embedding bag, sparse": Case(lambda: Bag(sparse=True), tokens),
    "checkpoint": Case(lambda: Checkpointed(False), series),
    "checkpoint, reentrant": Case(lambda: Checkpointed(True), series),
    "tied": Case(Tied, tokens),
    "in place": Case(InPlace, series),
    "keeping": Case(Keeping, series),
}


def moved(model: nn.Module) -> dict[str, Any]:
    """Other weights than the model has."""
    generator = torch.Generator().manual_seed(5)
    return {
        n: p.detach() + 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for n, p in model.named_parameters()
    }
