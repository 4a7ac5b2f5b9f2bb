"""What is kept of things that were read once: the last ones used, up to so many bytes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rasteret_dask.store.bytecache import ByteCache


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.integers(0, 40))))
def test_it_keeps_what_was_used_last(steps: list[tuple[bool, int, int]]) -> None:
    cache: ByteCache[int, bytes] = ByteCache(100, len)
    used: list[tuple[int, bytes]] = []  # the last one used at the end
    for put, key, size in steps:
        there = dict(used)
        if put:
            value = bytes(size)
            assert cache.put(key, value) is value
            used = [(k, v) for k, v in used if k != key] + [(key, value)]
            while sum(len(v) for _, v in used) > 100:
                used.pop(0)
        else:
            assert cache.get(key) == there.get(key)
            used = [(k, v) for k, v in used if k != key] + [(k, v) for k, v in used if k == key]
        assert cache.size == sum(len(v) for _, v in used)
        assert len(cache) == len(used)


def test_one_that_is_too_large_is_kept_alone() -> None:
    cache: ByteCache[str, bytes] = ByteCache(10, len)
    cache.put("a", bytes(4))
    cache.put("b", bytes(40))
    assert (len(cache), cache.size) == (1, 40)
    cache.clear()
    assert (len(cache), cache.size, cache.get("b")) == (0, 0, None)
