"""Runs groups of trials in this process, or in several processes that share its cores."""

import multiprocessing
import os
import signal
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import jax
from etils import epath

from benchmarks.study.digits_plan import Budget, Trial
from benchmarks.study.digits_runs import Bench
from dmpo_jax.parallel.compilation import cache_compilations

Group = Sequence[Trial] | None  # None asks for the base's images
Result = tuple[str, dict[str, Any]]  # name of the trial, or "base"


class Workers:
    """A context manager of worker processes; `run(groups)` yields each result when it is ready.

    count: number of processes, each with its share of the cores and one JAX device. With 1, no
    process is started, and trials use this process's devices. A worker's error ends all.
    """

    def __init__(self, count: int, budget: Budget, work: epath.Path):
        self._count, self._budget, self._work = count, budget, work
        self._connections: list[Connection] = []
        self._processes: list[Any] = []
        self._bench: Bench | None = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *exception: object) -> None:
        for connection in self._connections:
            connection.close()  # ends a waiting worker
        for process in self._processes:
            if any(exception):
                process.terminate()
            process.join()

    def run(self, groups: Sequence[Group]) -> Iterator[Result]:
        """Yields name and result of each trial, in order of completion."""
        if self._count == 1:
            self._bench = self._bench or Bench(self._budget, self._work)
            for group in groups:
                yield from results(self._bench, group)
            return
        self._start(min(self._count, len(groups)))
        waiting, busy = list(groups), list[Any]()
        for connection in self._connections:
            if waiting:
                connection.send(waiting.pop(0))
                busy.append(connection)
        while busy:
            ready: list[Any] = wait(busy)
            for connection in ready:
                message = receive(connection)
                if isinstance(message, tuple):
                    yield message
                elif waiting:
                    connection.send(waiting.pop(0))
                else:
                    busy.remove(connection)

    def _start(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")  # JAX's threads do not survive a fork
        for i in range(len(self._processes), count):
            ours, theirs = context.Pipe()
            arguments = (theirs, i, self._count, self._budget, os.fspath(self._work))
            process = context.Process(target=serve, args=arguments, daemon=True)
            process.start()
            theirs.close()  # so that the end of either process is seen by the other
            self._connections.append(ours)
            self._processes.append(process)


def receive(connection: Any) -> Any:
    """Returns a result, or None at the end of a group; RuntimeError if the worker failed."""
    try:
        message = connection.recv()
    except EOFError:
        raise RuntimeError("a worker ended without a word: was it killed for memory?") from None
    if isinstance(message, str):
        raise RuntimeError(f"a worker failed:\n{message}")
    return message


def serve(connection: Any, index: int, count: int, budget: Budget, work: str) -> None:
    """Loop of worker `index` of `count`: groups in, results out, until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started it
    if hasattr(os, "sched_setaffinity"):  # before JAX counts the cores
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[index::count] or cores)
    jax.config.update("jax_num_cpu_devices", 1)
    cache_compilations()
    try:
        bench = Bench(budget, epath.Path(work))
        while True:
            for result in results(bench, connection.recv()):
                connection.send(result)
            connection.send(None)
    except (EOFError, BrokenPipeError):
        return
    except Exception:
        connection.send(traceback.format_exc())


def results(bench: Bench, group: Group) -> Iterator[Result]:
    if group is None:
        yield "base", bench.judge_base()
        return
    for trial in group:
        try:
            result = bench.run(trial)
        except Exception as error:
            error.add_note(f"in {trial.name}")
            raise
        yield trial.name, result
