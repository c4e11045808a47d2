"""Tests for dmpo_jax/encoding/threads.py."""

import itertools
import threading
import time

import pytest

from dmpo_jax.encoding import threads


def test_map_ahead_keeps_order_and_holds_few():
    taken, most = 0, 0

    def items():
        nonlocal taken
        for i in range(60):
            taken = i
            yield i

    def slow(i):
        time.sleep(0.002 * (i % 3))
        return i

    done = []
    for i in threads.map_ahead(slow, items(), threads=3, ahead=5):
        done.append(i)
        time.sleep(0.003)
        most = max(most, taken - i)
    assert done == list(range(60))
    assert 3 <= most <= 5 + 2  # in the queue, being offered, and in hand


def test_map_ahead_raises_what_is_raised():
    def items():
        yield 1
        yield 0
        raise KeyError("source")

    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        list(threads.map_ahead(lambda i: 1 / i, items(), threads=2, ahead=4))
    with pytest.raises(KeyError, match="source"):
        list(threads.map_ahead(lambda i: i, items(), threads=2, ahead=4))
    endless = threads.map_ahead(lambda i: i, itertools.count(), threads=2, ahead=4)
    assert next(endless) == 0
    assert threading.active_count() > before
    endless.close()
    assert threading.active_count() == before
