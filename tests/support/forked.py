"""Commands in forks of one process that has imported what they need: each starts in no time."""

import json
import os
import pathlib
import subprocess
import sys

from tests.support import launched

SERVER = """
import importlib, json, os, pkgutil, sys
from dmpo_jax import commands, jobs
for module in pkgutil.iter_modules(jobs.__path__):
    importlib.import_module(f"dmpo_jax.jobs.{module.name}")
print("ready", flush=True)
for line in sys.stdin:
    (name, *flags), file = json.loads(line)
    child = os.fork()
    if not child:
        said = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        status = 70
        try:
            commands.main(name, [name, *flags])
        except SystemExit as ended:
            status = ended.code or 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Forked:
    """Runs command lines one after the other. A context manager."""

    def __init__(self, folder: pathlib.Path):
        self._said = folder / "said"
        self._server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SERVER],
            env={**os.environ, "PYTHONPATH": str(launched.ROOT), "JAX_PLATFORMS": "cpu"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._read() == "ready"

    def run(self, command: list[str]) -> tuple[int, str]:
        """(exit status, output) of `NAME --flag ...`."""
        assert self._server.stdin is not None
        print(json.dumps([command, str(self._said)]), file=self._server.stdin, flush=True)
        return int(self._read()), self._said.read_text()

    def __enter__(self) -> "Forked":
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.communicate("")

    def _read(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline().strip()
