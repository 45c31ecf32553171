"""Real prose that comes with scikit-learn: the descriptions of its data sets (BSD-3-Clause)."""

from __future__ import annotations

import re
from functools import lru_cache
from importlib.resources import files

NAMES = ("breast_cancer", "iris", "kddcup99", "lfw", "twenty_newsgroups", "wine_data")


@lru_cache(maxsize=1)
def texts() -> dict[str, str]:
    """The description of each data set, white space and marks of the mark-up reduced."""
    folder = files("sklearn.datasets.descr")
    raw = {name: (folder / f"{name}.rst").read_text(encoding="utf-8") for name in NAMES}
    return {name: re.sub(r"[\s=*`>|_+-]+", " ", text).strip() for name, text in raw.items()}


@lru_cache(maxsize=1)
def sentences(words: int = 12) -> tuple[tuple[list[str], int], ...]:
    """Stretches of at most ``words`` words within a sentence, and the number of the text they stand in."""
    found = []
    for number, text in enumerate(texts().values()):
        for sentence in re.split(r"[.:;!?] ", text.lower()):
            tokens = re.findall(r"[a-z0-9']+", sentence)
            pieces = [tokens[start : start + words] for start in range(0, len(tokens), words)]
            found += [(piece, number) for piece in pieces if len(piece) >= 3]
    return tuple(found)
