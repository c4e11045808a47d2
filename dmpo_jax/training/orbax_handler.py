"""Orbax's handlers of a run's state and its index, which say at once when writing has failed.

Orbax tells of a failure only after it has waited for the other processes, which may be waiting
for this one's part: up to its timeout of 600 s.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.future import Future


class Failure:
    """The first error of writing on this process, or None."""

    error: Exception | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.error = self.error or error
            raise


class _Watched:
    """A handler of Orbax whose errors `failure` keeps; first among the bases."""

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
    """A part of a save."""

    def __init__(self, future: Any, failure: Failure):
        self._future, self._failure = future, failure

    def result(self, timeout: float | None = None) -> Any:
        with self._failure.watching():
            return self._future.result(timeout)

    def cancel(self) -> bool | None:
        return self._future.cancel()


def array_registry() -> Any:
    """How Orbax writes arrays: those under 1 MB by one device.

    By default every replica writes a slice of every array: with thousands of small ones on
    eight devices that is six seconds a save, for nothing.
    """
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20)
    return ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
