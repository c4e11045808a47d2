"""How Orbax writes and reads a run's state: what is ours of it, by its public arguments."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp


class StateHandler(ocp.PyTreeCheckpointHandler):
    """Writes the state; `failed` is set as soon as that fails on this process.

    Orbax tells of a failure only after it has waited for the other processes, which may be
    waiting for this one's part: up to its timeout of 600 s.
    """

    def __init__(self):
        super().__init__(type_handler_registry=array_registry())
        self.failed: Exception | None = None

    async def async_save(self, *args: Any, **kwargs: Any) -> list[Any]:
        futures = await super().async_save(*args, **kwargs)
        return [_Watched(future, self) for future in futures or ()]

    def finalize(self, *args: Any, **kwargs: Any) -> None:
        with self.watching():
            super().finalize(*args, **kwargs)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.failed = error
            raise


class _Watched(ocp.future.Future):
    """A part of a save, which `handler` watches."""

    def __init__(self, future: Any, handler: StateHandler):
        self._future, self._handler = future, handler

    def result(self, timeout: float | None = None) -> Any:
        with self._handler.watching():
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
