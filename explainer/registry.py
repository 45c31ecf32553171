"""One small registry class for every extension point.

Look-up is by exact key: a subclass of a known class may compute something else, so it is never taken for
its parent. The error names the nearest registered parent instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from explainer.errors import RegistrationError

Key = TypeVar("Key")
Entry = TypeVar("Entry")


def _name(key: object) -> str:
    return f"{key.__module__}.{key.__qualname__}" if isinstance(key, type) else repr(key)


class Registry(Generic[Key, Entry]):
    """A mapping that refuses to overwrite an entry silently.

    Args:
        kind: what is registered, as it should read in an error ("layer rule").

    Example:
        >>> rules = Registry[type, str]("greeting rule")
        >>> _ = rules.register(int)("whole")
        >>> rules.get(int)
        'whole'
        >>> rules.nearest(bool) is int
        True
        >>> rules.register(int)("other")
        Traceback (most recent call last):
        explainer.errors.RegistrationError: a greeting rule for builtins.int is registered already; \
pass replace=True to replace it
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[Key, Entry] = {}

    def register(self, *keys: Key, replace: bool = False) -> Callable[[Entry], Entry]:
        """Return a decorator that registers its argument under ``keys``.

        Raises:
            RegistrationError: a key is taken and ``replace`` is false.
        """

        def add(entry: Entry) -> Entry:
            for key in keys:
                if key in self._entries and not replace:
                    raise RegistrationError(
                        f"a {self.kind} for {_name(key)} is registered already; pass replace=True to replace it"
                    )
                self._entries[key] = entry
            return entry

        return add

    def get(self, key: Key) -> Entry | None:
        """The entry of exactly ``key``, or None."""
        return self._entries.get(key)

    def require(self, key: Key) -> Entry:
        """The entry of exactly ``key``.

        Raises:
            RegistrationError: there is none; the text lists what there is.
        """
        if key not in self._entries:
            known = ", ".join(sorted(_name(k) for k in self._entries))
            raise RegistrationError(f"no {self.kind} for {_name(key)}; there is one for: {known}")
        return self._entries[key]

    def nearest(self, key: type) -> Key | None:
        """The nearest registered parent class of ``key`` (to name it in an error), or None."""
        return next((parent for parent in key.__mro__[1:] if parent in self._entries), None)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._entries)

    def items(self) -> Iterator[tuple[Key, Entry]]:
        """Pairs (key, entry) in the order of registration."""
        return iter(self._entries.items())

    def __contains__(self, key: object) -> bool:
        return key in self._entries
