"""One writer a folder: a lock file names the process that writes, and shows that it is alive.

On one machine the kernel holds the lock and frees it with the process, however that ends. Another
machine may not see the kernel's lock (object storage, some network file systems): there the
heartbeat in the file counts, and a lock whose heartbeat stands still is taken over.
"""

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from etils import epath

from dmpo_jax import storage
from dmpo_jax.errors import UserError

LOG = logging.getLogger(__name__)
NAME = ".lock"
BEAT = 10.0  # s between heartbeats
DEAD = 4 * BEAT  # s without one, seen by another machine
_held: dict[str, int] = {}  # folder -> how often this process holds it


@contextlib.contextmanager
def hold(folder: epath.PathLike, job: str) -> Iterator[None]:
    """Holds the folder for one job; makes the folder. The same process may hold it again.

    Object storage has no exclusive creation here: two jobs that start within the same second are
    told apart by reading back, which is likely but not certain to see both.

    Raises:
        UserError: another process writes there; names its job, machine, process and start.
    """
    path = storage.absolute(folder)
    key = os.fspath(path)
    if not _held.get(key):
        path.mkdir(parents=True, exist_ok=True)
        lock = (_Remote if storage.is_remote(path) else _Local)(path / NAME, job)
    else:
        lock = None
    _held[key] = _held.get(key, 0) + 1
    try:
        yield
    finally:
        _held[key] -= 1
        if lock is not None:
            lock.release()


class _Lock:
    """A lock file with a heartbeat, once `_claim` has returned."""

    def __init__(self, path: epath.Path, job: str):
        self._path = path
        self._me = {
            "job": job,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        self._beats = 0
        self._claim()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()

    def _claim(self) -> None:
        raise NotImplementedError

    def _write(self) -> None:
        raise NotImplementedError

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            self._beats += 1
            try:
                self._write()
            except Exception as error:  # a full disk must not end the job that it is part of
                LOG.debug("no heartbeat in %s: %s", self._path, error)

    def release(self) -> None:
        self._ended.set()
        self._thread.join(BEAT)
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _content(self) -> bytes:
        return json.dumps({**self._me, "beats": self._beats}).encode()

    def _holder(self) -> dict[str, Any] | None:
        found = storage.find_json(self._path)
        return found if isinstance(found, dict) else None

    def _refuse(self, holder: dict[str, Any] | None) -> None:
        who = "another process"
        if holder:
            who = (
                f"{holder.get('job')} (process {holder.get('process')} on {holder.get('host')}, "
                f"since {holder.get('since')})"
            )
        raise UserError(
            f"{self._path.parent} is in use by {who}: wait for its end, or choose another folder"
        )

    def _outlive(self, holder: dict[str, Any]) -> None:
        """Waits for a heartbeat; raises UserError if there is one, else says who is gone."""
        LOG.info(
            "%s was locked by process %s on %s: waiting up to %.0f s for its heartbeat",
            self._path.parent,
            holder.get("process"),
            holder.get("host"),
            DEAD,
        )
        end = time.monotonic() + DEAD
        while time.monotonic() < end:
            time.sleep(min(1.0, DEAD / 10))
            now = self._holder()
            if now is None:  # released, or being written
                if not self._path.exists():
                    return
            elif now != holder:
                self._refuse(now)
        self._say_gone(holder)

    def _say_gone(self, holder: dict[str, Any]) -> None:
        LOG.warning(
            "%s: %s (process %s on %s) has ended without releasing its lock; it is taken over",
            self._path.parent,
            holder.get("job"),
            holder.get("process"),
            holder.get("host"),
        )


class _Local(_Lock):
    def _claim(self) -> None:
        while True:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                self._claim_open()
            except BaseException:
                os.close(self._file)
                raise
            # A holder that ended between open and lock has removed the file that we locked.
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(self._file).st_ino == os.stat(self._path).st_ino:
                    return
            os.close(self._file)

    def _claim_open(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._refuse(self._holder())
        except OSError as error:  # a file system without locks: the heartbeat alone counts
            LOG.debug("no lock on %s: %s", self._path, error)
        holder = self._holder()
        if holder is not None and holder.get("host") != self._me["host"]:
            self._outlive(holder)
        elif holder is not None:
            self._say_gone(holder)
        self._write()

    def _write(self) -> None:
        content = self._content()
        os.pwrite(self._file, content, 0)
        os.ftruncate(self._file, len(content))

    def release(self) -> None:
        super().release()
        os.close(self._file)


class _Remote(_Lock):
    def _claim(self) -> None:
        if (holder := self._holder()) is not None:
            self._outlive(holder)
        self._write()
        time.sleep(min(1.0, DEAD / 10))
        if (holder := self._holder()) is not None and any(
            holder.get(name) != value for name, value in self._me.items()
        ):
            self._refuse(holder)

    def _write(self) -> None:
        self._path.write_bytes(self._content())
