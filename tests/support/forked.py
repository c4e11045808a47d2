"""Commands in forks of one process that has imported what they need: each starts in no time."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

from tests.support import launched

SERVER = """
import importlib, json, os, pkgutil, runpy, sys, traceback
from dmpo_jax import commands, jobs
for module in pkgutil.iter_modules(jobs.__path__):
    importlib.import_module(f"dmpo_jax.jobs.{module.name}")
# What is imported late: another user may not be able to read it.
for name in ("dmpo_jax.data.tfds", "tensorflow_datasets.scripts.cli.build", "sklearn.ensemble",
             "importlib.readers"):
    importlib.import_module(name)
from transformers import AutoTokenizer, CLIPTokenizer

def run(name, flags, file, user):
    said = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.setsid()
    if user is not None:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    status = 70
    try:
        if name == "tfds":
            sys.argv = [name, *flags]
            runpy.run_module("dmpo_jax.data.tfds", run_name="__main__")
        else:
            commands.main(name, [name, *flags])
    except SystemExit as ended:
        status = ended.code or 0
        if isinstance(status, str):
            print(status)
            status = 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

print("ready", flush=True)
for line in sys.stdin:
    told = json.loads(line)
    if isinstance(told, int):
        print(os.waitstatus_to_exitcode(os.waitpid(told, 0)[1]), flush=True)
        continue
    child = os.fork()
    if not child:
        run(*told)
    print(child, flush=True)
"""


class Forked:
    """A context manager. environment: beside this process's own. said: a folder for outputs."""

    def __init__(self, said: pathlib.Path, environment: dict[str, str]):
        self._said, self._count = said, 0
        self._server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SERVER],
            env={**os.environ, **environment, "PYTHONPATH": str(launched.ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._server.stdout is not None
        assert self._server.stdout.readline() == "ready\n"

    def start(self, name: str, flags: list[str], user: int | None = None) -> "Started":
        """user: the id of the one who runs it."""
        self._count += 1
        said = self._said / f"said_{self._count}"
        return Started(self, self.tell([name, flags, str(said), user]), said)

    def tell(self, what: int | list) -> int:
        """Has a process started, or waited for; returns its id, or its exit status."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(json.dumps(what), file=self._server.stdin, flush=True)
        return int(self._server.stdout.readline())

    def __enter__(self) -> "Forked":
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.communicate("")


class Started:
    """A command that runs."""

    def __init__(self, forked: Forked, pid: int, said: pathlib.Path):
        self._forked, self.pid, self._said = forked, pid, said

    def kill_after(self, seconds: float) -> bool:
        """Sends SIGKILL, unless it has ended by then; True if that was its end."""
        time.sleep(seconds)
        os.kill(self.pid, signal.SIGKILL)  # not yet waited for, so the id is still its own
        return self._forked.tell(self.pid) == -signal.SIGKILL

    def end(self) -> tuple[int, str]:
        """(exit status, output), once it has ended."""
        status = self._forked.tell(self.pid)
        return status, self._said.read_text()
