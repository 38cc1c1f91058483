"""Compiled Outlines indexes of an engine, bounded by the memory they take."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

import outlines_core as oc


class IndexCache:
    """The indexes that were used last; may be used by several threads.

    Args:
        max_entries: most indexes.
        max_bytes: of their serialized form and their keys; in memory they take about twice that.
    """

    def __init__(self, *, max_entries: int, max_bytes: int) -> None:
        self._max_entries, self._max_bytes = max_entries, max_bytes
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, tuple[oc.Index, int]] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def get(self, key: str, build: Callable[[], oc.Index]) -> oc.Index:
        """The index of a key, compiled where it is not known; an error of `build` is not kept.

        Two threads that miss at once both compile. One that is too large for the cache is returned
        all the same.
        """
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key][0]
        index = build()
        size = len(index.__reduce__()[1][0]) + 4 * len(key)
        with self._lock:
            self._put(key, index, size)
        return index

    def _put(self, key: str, index: oc.Index, size: int) -> None:
        if key in self._entries or size > self._max_bytes:
            return
        self._entries[key] = (index, size)
        self.num_bytes += size
        while len(self._entries) > self._max_entries or self.num_bytes > self._max_bytes:
            _, (_, dropped) = self._entries.popitem(last=False)
            self.num_bytes -= dropped
