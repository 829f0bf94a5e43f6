"""A cache of arrays that are costly to compute: least recently used goes first, bounded in entries and bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


V = TypeVar("V", bound=_Sized)


@dataclass(frozen=True)
class CacheInfo:
    """What a cache did and holds."""

    hits: int
    misses: int
    entries: int
    nbytes: int


class EmbeddingCache(Generic[V]):
    """Values with `nbytes`, by key; safe to use from several threads.

    Args:
        entries: at most so many; 0 keeps none.
        nbytes: at most so many bytes in all; a value larger than that is returned but not kept.
    """

    def __init__(self, *, entries: int = 256, nbytes: int = 256 << 20) -> None:
        self._entries = entries
        self._limit = nbytes
        self._held: OrderedDict[Hashable, V] = OrderedDict()
        self._lock = threading.Lock()
        self._nbytes = self._hits = self._misses = 0

    def get(self, key: Hashable, compute: Callable[[], V]) -> V:
        """The value of a key, computed if it is not held.

        The lock is not held while computing: threads that miss the same key at the same time each compute it, and all
        get the value of the first that was done.
        """
        with self._lock:
            if key in self._held:
                self._hits += 1
                self._held.move_to_end(key)
                return self._held[key]
            self._misses += 1
        value = compute()
        with self._lock:
            if key in self._held:
                return self._held[key]
            if value.nbytes > self._limit:
                return value
            self._held[key] = value
            self._nbytes += value.nbytes
            while len(self._held) > self._entries or self._nbytes > self._limit:
                self._nbytes -= self._held.popitem(last=False)[1].nbytes
        return value

    def clear(self) -> None:
        """Forget every value; the counters stay."""
        with self._lock:
            self._held.clear()
            self._nbytes = 0

    @property
    def info(self) -> CacheInfo:
        """Hits and misses so far, and what is held."""
        with self._lock:
            return CacheInfo(self._hits, self._misses, len(self._held), self._nbytes)
