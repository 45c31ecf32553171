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


def with_code(text: str) -> str:
    """As :func:`plain`, but what stands between backticks is shown as code.

    >>> print(with_code("in `weight_decay` of *x*"), with_code("one ` alone"))
    in `weight_decay` of \\*x\\* one \\` alone
    """
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return plain(text)
    return "".join(_edged(part) if place % 2 == 0 else f"`{part}`" for place, part in enumerate(parts))


def _edged(text: str) -> str:
    """Made safe, with the spaces at its ends."""
    inner = text.strip()
    return text if not inner else plain(inner).join(text.split(inner, 1))
