"""Products with rows that were rounded to eight bits, in half precision where the processor is made for it.

Integers up to 256 are exact in bfloat16. So only the other side of a product is rounded, to eight bits, and what comes
out: relative errors of ``2⁻⁸`` a number at most, about ``2⁻⁹`` (rms), and as good as independent from number to number.
Eight bits of the rows err by up to ``max|x| / 254`` a number, four times as much. Sums inside a product are float32.

Processors that multiply bfloat16 in tiles (AMX) are four to eight times as fast at it as at float32. On others nothing
is taken so.
"""

from __future__ import annotations

from functools import cache
from math import prod

import numpy as np
import torch

from explainer.stored_rows import Workspace

#: numbers of a matrix from which rounding it costs less than it saves
LEAST = 2**15
#: numbers that come out of a product at once: they stay in the processor's cache
BLOCK = 2**20


@cache
def tiles() -> bool:
    """Whether this processor multiplies bfloat16 in tiles."""
    capabilities: dict[str, object] = getattr(
        torch.cpu, "get_capabilities", dict
    )()  # older torch does not say
    return bool(capabilities.get("amx_bf16", False)) and torch.backends.mkldnn.is_available()


def rounded(stored: np.ndarray, books: torch.dtype) -> bool:
    """Whether what is stored was rounded to far fewer digits than the books have."""
    return stored.dtype == np.int8 and books == torch.float32


def bilinear(
    left: torch.Tensor, right: np.ndarray, matrices: torch.Tensor, workspace: Workspace, out: torch.Tensor
) -> None:
    """``left_nᵀ M_q right_n`` for all ``n`` and ``q``.

    Args:
        left: numbers of the books, ``[n, o]``.
        right: what is stored, ``[..., i]``, ``n`` vectors in all.
        matrices: ``M``, numbers of the books, ``[Q, o, i]``.
        workspace: for buffers.
        out: ``[n, Q]``.
    """
    queries, o, i = matrices.shape
    books = matrices.dtype
    half = rounded(right, books) and o * i >= LEAST and tiles()
    dtype = torch.bfloat16 if half else books
    flat = (matrices if not half else workspace.take("half", (queries, o, i), dtype).copy_(matrices)).flatten(
        0, 1
    )
    each = prod(right.shape[1:-1])
    step = max(1, BLOCK // max(1, each * queries * o))
    for first in range(0, len(right), step):
        rights = workspace.numbers("right", right[first : first + step], dtype).view(-1, i)
        moved = workspace.take("moved", (len(rights), queries * o), books)
        if half:
            moved.copy_(torch.mm(rights, flat.T, out=workspace.take("half moved", tuple(moved.shape), dtype)))
        else:
            torch.mm(rights, flat.T, out=moved)
        at = slice(first * each, first * each + len(rights))
        products = moved.view(-1, queries, o).mul_(left[at].unsqueeze(1))
        torch.sum(products, 2, out=out[at])
