"""Traces some updates with JAX's profiler, for xprof or Perfetto."""

import logging
import pathlib
import tempfile

import jax
from etils import epath

LOG = logging.getLogger(__name__)


class Trace:
    """Traces updates `first` to `last`, both included, into a folder. A context manager.

    Args:
        steps: (first, last); None traces nothing. The first update of a process compiles,
            and is never traced.
        folder: local or on object storage; every process writes its own files.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: epath.Path):
        self._steps, self._folder = steps, folder
        self._local: tempfile.TemporaryDirectory[str] | None = None  # while tracing

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._local is not None:
            self.switch()

    def due(self, number: int) -> bool:
        """True if the trace must begin or end now that update `number` is finished."""
        if self._steps is None:
            return False
        first, last = self._steps
        return number >= last if self._local else first - 1 <= number < last

    def switch(self) -> None:
        """Begins the trace, or ends and writes it. The device should have nothing in flight."""
        if self._local is None:
            self._local = tempfile.TemporaryDirectory()
            jax.profiler.start_trace(self._local.name)
            return
        with self._local as name:
            jax.profiler.stop_trace()
            # The profiler's writer supports fewer kinds of storage than the rest of a run.
            try:
                for file in sorted(p for p in pathlib.Path(name).rglob("*") if p.is_file()):
                    target = self._folder / str(file.relative_to(name))
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(file.read_bytes())
                LOG.info("traced into %s", self._folder)
            except OSError as error:  # a trace must not end a run
                LOG.warning("the trace cannot be written: %s", error)
        self._local, self._steps = None, None
