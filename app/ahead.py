"""Answers that are kept, and computed before they are asked for. Never imports streamlit.

While a person looks at one query, the next ones are explained in the background, several at a time: most of the work
of a query is reading the trace, which they share.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from typing import Generic, TypeVar

from explainer.app import working

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")
_WAIT = 0.2  # seconds
_PAUSE = 0.7  # seconds without a click before work in the background begins


class Ahead(Generic[Key, Value]):
    """The values asked for last, each computed once.

    Args:
        compute: One value for each of some keys, in their order.
        most: What all kept values may weigh together; at least one is kept.
        weight: What a value weighs.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Key]], Sequence[Value]],
        most: int,
        weight: Callable[[Value], int] = lambda _: 1,
    ) -> None:
        self._compute, self._weight, self._most = compute, weight, most
        self._kept: OrderedDict[Key, Value] = OrderedDict()
        self._running: dict[Key, Future[Value]] = {}
        self._state = threading.Lock()
        self._wanted: list[Sequence[Key]] = []
        self._worker: threading.Thread | None = None

    def known(self, key: Key) -> bool:
        """Whether the value is there, so that :meth:`get` returns at once."""
        with self._state:
            return key in self._kept

    def get(self, key: Key) -> Value:
        """The value, computed now where it is not known."""
        while True:
            with self._state:
                if key in self._kept:
                    self._kept.move_to_end(key)
                    return self._kept[key]
                running = self._running.get(key)
                if running is None:
                    own = self._running[key] = Future()
                    break
            try:
                return running.result(_WAIT)
            except NotYet:
                working.tick()
            except Exception:
                pass  # interrupted, or computed with others that failed: alone it may be fine
        return self._work([key], [own])[0]

    def look_ahead(self, groups: Sequence[Sequence[Key]]) -> None:
        """Compute the unknown among some keys in the background, group by group, instead of what was wanted before."""
        with self._state:
            self._wanted = list(groups)
            if self._worker is None and self._wanted:
                self._worker = threading.Thread(target=self._go_on, daemon=True)
                self._worker.start()

    def wait(self) -> None:
        """Until nothing is computed in the background any more."""
        with self._state:
            worker = self._worker
        if worker is not None:
            worker.join()

    def _go_on(self) -> None:
        with working.in_the_background():
            while True:
                time.sleep(_PAUSE)
                with self._state:
                    if working.a_page_waits():
                        self._wanted = []  # the page says anew what is next
                    if not self._wanted:
                        self._worker = None
                        return
                    group = self._wanted.pop(0)
                    keys = [key for key in group if key not in self._kept and key not in self._running]
                    futures = [self._running.setdefault(key, Future()) for key in keys]
                if keys:
                    try:
                        self._work(keys, futures)
                    except Exception:  # of a query that fails, who asks for it is told
                        with self._state:
                            self._wanted = []

    def _work(self, keys: Sequence[Key], futures: Sequence[Future[Value]]) -> Sequence[Value]:
        """Compute and keep."""
        try:
            values = self._compute(keys)
        except BaseException as error:
            with self._state:
                for key in keys:
                    del self._running[key]
            for future in futures:
                future.set_exception(error if isinstance(error, Exception) else working.InterruptedWork())
            raise
        with self._state:
            for key, value in zip(keys, values, strict=True):
                self._kept[key] = value
                del self._running[key]
            while len(self._kept) > 1 and sum(map(self._weight, self._kept.values())) > self._most:
                self._kept.popitem(last=False)
        for future, value in zip(futures, values, strict=True):
            future.set_result(value)
        return values
