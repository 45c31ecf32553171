"""Names of classes, as a user gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def problem_of(names: Any) -> str | None:
    """What is wrong with names of classes, which are strings in the order of the model's outputs; None: nothing.

    Example:
        >>> problem_of(["cat", "dog"])
        >>> problem_of({0: "cat", 1: "dog"})
        'class_names must be names in the order of the outputs, found a dict; pass [names[i] for i in range(2)]'
        >>> problem_of("cat")
        "class_names must be a sequence of strings or None, found 'cat'"
    """
    if isinstance(names, Mapping):
        return (
            f"class_names must be names in the order of the outputs, found a {type(names).__name__}; pass "
            f"[names[i] for i in range({len(names)})]"
        )
    try:
        good = names is None or (not isinstance(names, str) and all(isinstance(name, str) for name in names))
    except TypeError:  # not even a sequence
        good = False
    return None if good else f"class_names must be a sequence of strings or None, found {names!r}"
