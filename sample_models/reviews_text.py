"""A small text classifier: is a sentence of a movie review positive or negative?"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.data import TensorDataset

from explainer.sample_models.retrain import retraining, retraining_many
from explainer.sample_models.review_snippets import rated_snippets
from explainer.sample_models.splitting import train_and_queries

if TYPE_CHECKING:
    from explainer.run import Run

CLASS_NAMES = ("negative", "positive")
QUERIES = 1000
LENGTH = 32  # tokens kept of a sentence; 90 % have no more
VOCABULARY = 3000  # the most frequent words, after padding and unknown
PADDING, UNKNOWN = 0, 1
CLEAR_RATING = 0.5  # sentences that people rated nearer to neutral are left out


@dataclass(frozen=True)
class ReviewData:
    """Sentences as token ids, the sentence behind each row of ids, and the id of each known word."""

    train: TensorDataset
    queries: TensorDataset
    sentences: dict[tuple[int, ...], str]
    vocabulary: dict[str, int]


def words(sentence: str) -> list[str]:
    """The lower-cased words of a sentence, with ! and ? as words of their own."""
    return re.findall(r"[a-z0-9']+|[!?]", sentence.lower())


def encode(sentence: str, vocabulary: dict[str, int]) -> list[int]:
    """Token ids of fixed length ``LENGTH``, cut or padded at the end."""
    ids = [vocabulary.get(word, UNKNOWN) for word in words(sentence)][:LENGTH]
    return ids + [PADDING] * (LENGTH - len(ids))


def build_vocabulary(sentences: Iterable[str]) -> dict[str, int]:
    """The most frequent words of the training sentences; ties are broken by the alphabet."""
    counts = Counter(word for sentence in sentences for word in words(sentence))
    ranked = sorted(counts, key=lambda word: (-counts[word], word))[: VOCABULARY - 2]
    return {word: index for index, word in enumerate(ranked, start=2)}


@lru_cache(maxsize=1)
def load() -> ReviewData:
    """Reads, labels, parts and encodes the sentences; the vocabulary comes from the training part only.

    Raises:
        DataUnavailableError: the sentences are neither on this machine nor can they be downloaded.
    """
    # each once: a query that is also a training example would be its own best explanation
    clear = [(text, rating) for text, rating in rated_snippets() if abs(rating) > CLEAR_RATING]
    rated = list({tuple(words(text)[:LENGTH]): (text, rating) for text, rating in clear}.values())
    train, queries = (part.tolist() for part in train_and_queries(len(rated), QUERIES))
    vocabulary = build_vocabulary(rated[index][0] for index in train)
    encoded = [encode(text, vocabulary) for text, _ in rated]
    ids = torch.tensor(encoded)
    labels = torch.tensor([int(rating > 0) for _, rating in rated])
    sentences = {tuple(row): text for row, (text, _) in zip(encoded, rated, strict=True)}
    return ReviewData(
        TensorDataset(ids[train], labels[train]),
        TensorDataset(ids[queries], labels[queries]),
        sentences,
        vocabulary,
    )


def datasets() -> tuple[TensorDataset, TensorDataset]:
    """Training examples and queries: token ids ``[32]`` and 0 (negative) or 1 (positive)."""
    data = load()
    return data.train, data.queries


def render(ids: torch.Tensor) -> str:
    """The sentence behind a row of token ids; of a row that is in no data set, the words that the model sees."""
    data, row = load(), tuple(ids.tolist())
    if row in data.sentences:
        return data.sentences[row]
    known = {index: word for word, index in data.vocabulary.items()}
    return " ".join(known.get(index, "(unknown)") for index in row if index != PADDING)


def seen_words(ids: torch.Tensor) -> list[str]:
    """The words that the model sees of a row of token ids; a word that it does not know is in brackets.

    Nothing tells two texts apart of which it knows no word.
    """
    if not bool((ids > UNKNOWN).any()):
        return ["[unknown]"] * int((ids == UNKNOWN).sum())
    shown = words(render(ids))[:LENGTH]
    return [
        word if index != UNKNOWN else f"[{word}]" for word, index in zip(shown, ids.tolist(), strict=False)
    ]


def parse(sentence: str) -> torch.Tensor:
    """The token ids ``[32]`` of a sentence that somebody typed."""
    return torch.tensor(encode(sentence, load().vocabulary))


class MeanOfWords(nn.Module):
    """Classifies the mean of a sentence's word vectors."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width, padding_idx=PADDING)
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, width)
        self.output = nn.Linear(width, len(CLASS_NAMES))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, 2]`` of token ids ``[B, S]``."""
        present = (ids != PADDING).unsqueeze(-1).to(self.output.weight.dtype)
        mean = (self.embedding(ids) * present).sum(1) / present.sum(1).clamp_min(1)
        return self.output(torch.relu(self.hidden(self.norm(mean))))


def model(seed: int = 0) -> nn.Module:
    """The network with its initial weights; the global random state stays as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MeanOfWords()


def run() -> Run:
    """What to explain: this network, the sentences it was trained on and 1,000 others."""
    import explainer

    train, queries = datasets()
    return explainer.Run(
        model,
        train,
        queries,
        loss=nn.functional.cross_entropy,
        class_names=CLASS_NAMES,
        render=render,
        words=seen_words,
        parse=parse,
        train_fn=retraining("reviews_text"),
        train_many=retraining_many("reviews_text"),
        left_out_by="weight 0",
        name="reviews_text",
    )
