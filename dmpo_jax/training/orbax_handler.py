"""Orbax handlers of a run's state and index that report a failed write at once.

Orbax reports a failure only after waiting for the other processes, up to its timeout of 600 s.
These may themselves be waiting for this one's part.
"""

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.future import Future

DRAIN = 10.0  # s that writes have to end once one has failed


class Failure:
    """The first write error on this process, or None."""

    error: Exception | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.error = self.error or error
            raise


class _Watched:
    """Mixin for an Orbax handler: `failure` records its errors. Must be the first base."""

    def __init__(self, failure: Failure, **kwargs: Any):
        super().__init__(**kwargs)
        self._failure = failure

    async def async_save(self, *args: Any, **kwargs: Any) -> list[Any]:
        futures = await super().async_save(*args, **kwargs)  # pyright: ignore
        return [_WatchedFuture(future, self._failure) for future in futures or ()]

    def finalize(self, *args: Any, **kwargs: Any) -> None:
        with self._failure.watching():
            super().finalize(*args, **kwargs)  # pyright: ignore


class StateHandler(_Watched, ocp.PyTreeCheckpointHandler):
    """Writes and reads arrays."""


class IndexHandler(_Watched, ocp.JsonCheckpointHandler):
    """Writes and reads JSON."""


class _WatchedFuture(Future):
    """One part of a save, whose error `failure` records."""

    def __init__(self, future: Any, failure: Failure):
        self._future, self._failure = future, failure

    def result(self, timeout: float | None = None) -> Any:
        with self._failure.watching():
            return self._future.result(timeout)

    def cancel(self) -> bool | None:
        return self._future.cancel()


class _EachRead:
    """Mixin for a type handler: an error is raised when every read has ended.

    Orbax closes the event loop at the first error. tensorstore reports every read that ends later
    to the closed loop, prints a traceback for each, and may never end a read of the next loop.
    """

    async def metadata(self, infos: Any) -> Any:
        read = super().metadata  # pyright: ignore
        return await _all([read([info]) for info in infos])

    async def deserialize(self, infos: Any, args: Any = None) -> Any:
        read = super().deserialize  # pyright: ignore
        return await _all([read([info], [arg]) for info, arg in zip(infos, args, strict=True)])


async def _all(reads: list[Any]) -> list[Any]:
    """Waits for every read, of one array each; raises the first error then."""
    found = await asyncio.gather(*reads, return_exceptions=True)
    for one in found:
        if isinstance(one, BaseException):
            raise one
    return [array for (array,) in found]


class _NumpyHandler(_EachRead, ocp.type_handlers.NumpyHandler):
    """Reads arrays on the host."""


class _ArrayHandler(_EachRead, ocp.type_handlers.ArrayHandler):
    """Reads and writes arrays. If one write fails, the others end before the loop is closed."""

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> Any:
        created = infos[0].await_path_creation

        async def prepare() -> None:  # the first call in the event loop of the writes
            _drain_at_close(asyncio.get_running_loop())
            await created()

        infos[0].await_path_creation = prepare
        return await super().serialize(values, infos, args)


def _drain_at_close(loop: Any) -> None:
    close = loop.close

    def drain() -> None:
        # At least one round, in which `gather` learns of the errors after the first.
        loop.run_until_complete(_wait_for_others())
        close()

    loop.close = drain


async def _wait_for_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        await asyncio.wait(others, timeout=DRAIN)
    await asyncio.sleep(0)


def array_registry() -> Any:
    """Returns a type registry that has one device write an array under 1 MiB.

    By default every replica writes a slice of every array. With thousands of small ones on
    eight devices that costs six seconds per save.
    """
    arrays = _ArrayHandler(min_slice_bytes_for_replica_parallel=2**20)
    return ocp.type_handlers.create_type_handler_registry(
        (jax.Array, arrays), (np.ndarray, _NumpyHandler())
    )
