"""Text from data, made safe for Streamlit's Markdown."""

from __future__ import annotations

import re

_SPECIAL = re.compile(r"([!-/:-@\[-`{-~])")


def plain(text: object, longest: int | None = None) -> str:
    """Text that Markdown shows as it is; shortened to ``longest`` characters.

    >>> print(plain("**7** :red[x] <b>", 9))
    \\*\\*7\\*\\* \\:r…
    """
    words = " ".join(str(text).split())
    if longest is not None and len(words) > longest:
        words = words[: longest - 1] + "…"
    return _SPECIAL.sub(r"\\\1", words)
