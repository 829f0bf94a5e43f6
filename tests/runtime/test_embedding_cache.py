"""A cache that is bounded, counts, and is used from several threads at once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from latentrt.runtime.embedding_cache import CacheInfo, EmbeddingCache


def arrays(size: int = 10) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.zeros(size, dtype=np.uint8)


def test_a_value_is_computed_once_and_counted() -> None:
    cache = EmbeddingCache[np.ndarray]()
    first = cache.get("a", arrays)
    assert cache.get("a", lambda: pytest.fail("computed again")) is first
    assert cache.info == CacheInfo(hits=1, misses=1, entries=1, nbytes=10)
    cache.clear()
    assert cache.get("a", arrays) is not first
    assert cache.info == CacheInfo(hits=1, misses=2, entries=1, nbytes=10)


def test_the_least_recently_used_goes_first() -> None:
    cache = EmbeddingCache[np.ndarray](entries=2)
    held = {key: cache.get(key, arrays) for key in "ab"}
    assert cache.get("a", arrays) is held["a"]
    cache.get("c", arrays)
    assert cache.get("a", arrays) is held["a"]
    assert cache.get("b", arrays) is not held["b"]


def test_bytes_are_bounded() -> None:
    cache = EmbeddingCache[np.ndarray](nbytes=25)
    for key in "abcd":
        cache.get(key, arrays)
    assert cache.info.entries == 2
    assert cache.info.nbytes == 20
    cache.get("large", lambda: arrays(26))
    assert cache.info.entries == 2
    assert EmbeddingCache[np.ndarray](entries=0).get("a", arrays).nbytes == 10


def test_an_error_is_not_kept() -> None:
    cache = EmbeddingCache[np.ndarray]()
    with pytest.raises(ZeroDivisionError):
        cache.get("a", lambda: arrays(1 // 0))
    assert cache.get("a", arrays).nbytes == 10


def test_threads_that_miss_together_get_one_value() -> None:
    cache = EmbeddingCache[np.ndarray]()
    together = threading.Barrier(8)

    def slow() -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        together.wait(timeout=30)
        return arrays()

    with ThreadPoolExecutor(8) as pool:
        values = list(pool.map(lambda _: cache.get("a", slow), range(8)))
    assert all(value is values[0] for value in values)
    assert cache.info == CacheInfo(hits=0, misses=8, entries=1, nbytes=10)
