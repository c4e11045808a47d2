"""A threaded map that runs ahead of its consumer."""

import concurrent.futures
import queue
import threading
from collections.abc import Callable, Generator, Iterable
from typing import Any, TypeVar

A, B = TypeVar("A"), TypeVar("B")
_END = object()


def map_ahead(
    function: Callable[[A], B], items: Iterable[A], *, threads: int, ahead: int
) -> Generator[B, None, None]:
    """Yields `map(function, items)`, in order, computed in threads; holds at most `ahead` results.

    A separate thread iterates over `items`. Its errors, and those of `function`, are raised here,
    in order.
    """
    futures: queue.Queue[Any] = queue.Queue(maxsize=max(ahead, 1))
    stop = threading.Event()

    def offer(future: Any) -> bool:
        while not stop.is_set():
            try:
                futures.put(future, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def take() -> None:
        try:
            for item in items:
                if not offer(pool.submit(function, item)):
                    return
            offer(_END)
        except BaseException as error:
            offer(error)

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        taker = threading.Thread(target=take, daemon=True)
        taker.start()
        try:
            while (future := futures.get()) is not _END:
                if isinstance(future, BaseException):
                    raise future
                yield future.result()
        finally:
            stop.set()
            taker.join()
            pool.shutdown(wait=True, cancel_futures=True)
