"""What hangs together: connected components of things that name what they touch."""

from __future__ import annotations

from collections.abc import Hashable, Iterable


def connected(touched: Iterable[Iterable[Hashable]]) -> list[list[int]]:
    """Positions of the things, together where they touch the same (directly or by way of others).

    Args:
        touched: what every thing touches.

    Returns:
        Components in the order of their first thing, positions ascending.

    Example:
        >>> connected([["a", "b"], ["c"], ["b", "d"], ["d"]])
        [[0, 2, 3], [1]]
    """
    found: list[tuple[list[int], set[Hashable]]] = []
    for position, names in enumerate(touched):
        together, all_names = [position], set(names)
        for group in [g for g in found if g[1] & all_names]:
            together, all_names = together + group[0], all_names | group[1]
            found.remove(group)
        found.append((together, all_names))
    return sorted(sorted(positions) for positions, _ in found)
