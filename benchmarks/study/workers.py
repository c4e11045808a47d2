"""Runs jobs of the comparison in several processes that share the cores."""

import multiprocessing
import os
import signal
import traceback
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import wait
from typing import Any

import jax
from etils import epath

from benchmarks.study.bench import Bench
from benchmarks.study.trials import Budget, Job, missing
from dmpo_jax.parallel.compilation import cache_compilations

Result = tuple[str, dict[str, Any]]  # name of the trial, or "base TASK"


class Workers:
    """A context manager of worker processes; `run(jobs, runs)` yields each result when it is ready.

    count: number of processes, each with its share of the cores and one JAX device. A worker's
    error ends all.
    """

    def __init__(self, count: int, budget: Budget, work: epath.Path, judge: str):
        self._judge = judge
        context = multiprocessing.get_context("spawn")  # JAX's threads do not survive a fork
        self._connections: list[Any] = []
        self._processes: list[Any] = []
        for i in range(count):
            ours, theirs = context.Pipe()
            arguments = (theirs, i, count, budget, os.fspath(work), judge)
            process = context.Process(target=serve, args=arguments, daemon=True)
            process.start()
            theirs.close()  # so that the end of either process is seen by the other
            self._connections.append(ours)
            self._processes.append(process)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *exception: object) -> None:
        for connection in self._connections:
            connection.close()  # ends a waiting worker
        for process in self._processes:
            if any(exception):
                process.terminate()
            process.join()

    def run(self, jobs: Sequence[Job], runs: dict[str, dict[str, Any]]) -> Iterator[Result]:
        """Yields name and result of each trial, in order of completion; adds them to `runs`."""
        waiting, idle, busy = list(jobs), list(self._connections), list[Any]()
        while True:
            for job in list(waiting):
                trials = missing(job, runs, self._judge)
                if trials == []:
                    waiting.remove(job)
                elif trials and idle:
                    waiting.remove(job)
                    idle[0].send((job, runs))
                    busy.append(idle.pop(0))
            if not busy:
                return
            ready: list[Any] = wait(busy)
            for connection in ready:
                message = receive(connection)
                if message is None:
                    busy.remove(connection)
                    idle.append(connection)
                else:
                    runs[message[0]] = message[1]
                    yield message


def receive(connection: Any) -> Any:
    """Returns a result, or None at the end of a job; RuntimeError if the worker failed."""
    try:
        message = connection.recv()
    except EOFError:
        raise RuntimeError("a worker ended without a word: was it killed for memory?") from None
    if isinstance(message, str):
        raise RuntimeError(f"a worker failed:\n{message}")
    return message


def serve(connection: Any, index: int, count: int, budget: Budget, work: str, judge: str) -> None:
    """Loop of worker `index` of `count`: jobs in, results out, until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started it
    if hasattr(os, "sched_setaffinity"):  # before JAX counts the cores
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[index::count] or cores)
    jax.config.update("jax_num_cpu_devices", 1)
    cache_compilations()
    try:
        bench = Bench(budget, epath.Path(work))
        while True:
            job, runs = connection.recv()
            for result in results(bench, job, runs, judge):
                connection.send(result)
            connection.send(None)
    except (EOFError, BrokenPipeError):
        return
    except Exception:
        connection.send(traceback.format_exc())


def results(bench: Any, job: Job, runs: Mapping[str, Any], judge: str) -> Iterator[Result]:
    """Runs a job's trials until none is missing; the base's images first, if they are."""
    runs = dict(runs)
    base = f"base {job.task}"
    if base not in runs:
        runs[base] = bench.base(job.task)
        yield base, runs[base]
    while trials := missing(job, runs, judge):
        trial = trials[0]
        try:
            runs[trial.name] = bench.run(trial)
        except Exception as error:
            error.add_note(f"in {trial.name}")
            raise
        yield trial.name, runs[trial.name]
