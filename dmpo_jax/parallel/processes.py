"""Multi-process runs: joining the processes, and ending all of them when one fails.

Exit statuses, for the launcher to act on:

    0     the work is done
    1     an error, which another run would repeat
    75    RESTART: a process was lost or hangs, or the processes could not join
    130   Ctrl-C in a run on one process, or an alarm (train.stop_on_alarm): saved
    143   SIGTERM: saved (Ctrl-C in a run on many processes too)
    134, 137 and others above 128: ended by JAX after losing a process, or by the system

Run the same command again on 75 and on all above 128 but 130.
"""

import contextlib
import functools
import json
import logging
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from dmpo_jax import locks
from dmpo_jax.errors import UserError, printable
from dmpo_jax.parallel import jax_internals

LOG = logging.getLogger(__name__)
RESTART = 75  # EX_TEMPFAIL of sysexits.h: "the user is invited to retry"
INTERVAL = 1.0  # seconds between polls for another process's failure
_joined = threading.Event()  # set by `join`: there is a store, and `_watch` polls it
_FAILED = "dmpo_jax/failed"  # key of a failure in the coordinator's store
ANSWER = 10  # seconds within which a live process reaches a barrier
# Start of a collective's error when another process is gone: the code of its status. On CPUs it is
# a ValueError, as many an error of this process is.
_STATUS = re.compile("(UNKNOWN|INTERNAL|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED): ")


class Peers(NamedTuple):
    """The processes of a job. JAX asks the cluster for fields that are None."""

    coordinator: str | None  # HOST:PORT of process 0
    processes: int
    process_id: int | None
    where: str  # source of the settings


def join(
    *,
    coordinator: str = "",
    processes: int = 0,
    process_id: int = -1,
    join_limit: int = 300,
    heartbeat: int = 100,
) -> None:
    """Joins the other processes of a multi-process run, before anything asks for a device.

    Settings come from the arguments, else from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID, else from the cluster: SLURM, Cloud TPU slices, GKE, Kubernetes' indexed
    jobs, Open MPI. Does nothing for one process, or if already joined.

    Args:
        coordinator: HOST:PORT that process 0 listens on and all others can reach.
        processes: number of processes; 0 is unset, 1 asks no cluster.
        process_id: index of this process; -1 is unset.
        join_limit: seconds after which the process ends with RESTART if not all have joined.
        heartbeat: seconds without a sign of life after which a process counts as dead. JAX
            then aborts the others (status 134).

    Raises:
        UserError: the settings are incomplete or contradictory.
    """
    if jax.distributed.is_initialized():
        return
    peers = find_peers(coordinator, processes, process_id, os.environ)
    if peers is None:
        return
    LOG.info("one of %d processes (%s)", peers.processes, peers.where)
    if peers.process_id == 0 and peers.coordinator:
        _check_port(peers.coordinator)
    alarm = threading.Timer(join_limit, _give_up, (peers, join_limit))
    alarm.daemon = True
    alarm.start()
    # All is known, except under SLURM the task's GPU on its node.
    known = None not in peers and "SLURM_LOCALID" not in os.environ
    try:
        jax.distributed.initialize(
            peers.coordinator,
            peers.processes,
            peers.process_id,
            local_device_ids=local_devices(os.environ),
            cluster_detection_method="deactivate" if known else None,
            # Longer than join_limit: at its own limit JAX aborts with a page of C++ frames.
            initialization_timeout=2 * join_limit + 60,
            heartbeat_timeout_seconds=heartbeat,
        )
    except RuntimeError as error:
        end(RESTART, f"cannot join the other processes: {_first_line(error)}")
    finally:
        alarm.cancel()
    _joined.set()
    threading.Thread(
        target=_watch, args=(jax_internals.store(), jax_internals.process_index()), daemon=True
    ).start()


def join_and_quiet(**settings: Any) -> None:
    """Joins the other processes (`join`); all but process 0 then log warnings and errors only."""
    join(**settings)
    # Process 0 logs for all. jax.process_index() would ask for a device, too early.
    if jax.distributed.is_initialized() and jax_internals.process_index() > 0:
        logging.getLogger("dmpo_jax").setLevel(logging.WARNING)


def find_peers(
    coordinator: str, processes: int, process_id: int, environ: Mapping[str, str]
) -> Peers | None:
    """Finds this job's processes from settings, environment or cluster; None for a single one.

    Raises:
        UserError: as `join`.
    """
    coordinator = coordinator or environ.get("JAX_COORDINATOR_ADDRESS", "")
    processes = processes or _integer(environ, "JAX_NUM_PROCESSES", 0)
    process_id = process_id if process_id >= 0 else _integer(environ, "JAX_PROCESS_ID", -1)
    if processes == 1 and process_id <= 0:
        return None
    cluster = None
    if not (coordinator and processes and process_id >= 0):
        cluster = jax_internals.find_cluster(environ)
    name, count = cluster or ("", 0)
    if not processes and count == 1:
        return None
    if not cluster:
        if not coordinator and not processes and process_id < 0:
            return None
        missing = [
            words
            for words, there in {
                "distributed.coordinator (JAX_COORDINATOR_ADDRESS)": coordinator,
                "distributed.processes (JAX_NUM_PROCESSES)": processes,
                "distributed.process_id (JAX_PROCESS_ID)": process_id >= 0,
            }.items()
            if not there
        ]
        if missing:
            raise UserError(
                "to run on several processes, coordinator, number of processes and process_id "
                f"must all be set, but {' and '.join(missing)} is not, and no cluster is found "
                "that says it"
            )
    if coordinator and not re.fullmatch(r"\S+:\d+", coordinator):
        raise UserError(f"distributed.coordinator must be HOST:PORT, but got {coordinator!r}")
    processes = processes or count
    if process_id >= processes:
        raise UserError(
            f"distributed.process_id must be below the number of processes, {processes}, but got "
            f"{process_id}"
        )
    return Peers(
        coordinator or None,
        processes,
        process_id if process_id >= 0 else None,
        name or "as set",
    )


def local_devices(environ: Mapping[str, str]) -> list[int] | None:
    """Returns the indices of this process's GPUs; None leaves the choice to JAX.

    Under SLURM, JAX gives each task the one GPU of its number on the node. A task alone on its
    node would leave all other GPUs idle: it takes all that it sees.
    """
    alone = re.fullmatch(r"1(\(x\d+\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    visible = list(filter(None, environ.get("CUDA_VISIBLE_DEVICES", "").split(",")))
    if alone and len(visible) > 1 and "JAX_LOCAL_DEVICE_IDS" not in environ:
        return list(range(len(visible)))
    return None


def barrier(name: str) -> None:
    """Blocks until every process has reached `name`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"dmpo_jax: {name}")


def of_first(value: int) -> int:
    """Returns process 0's value, below 2**31. Every process must call it."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


@contextlib.contextmanager
def writing(folder: epath.PathLike, job: str) -> Iterator[None]:
    """Holds a folder that this job's processes write (`locks.hold`); process 0 does it for all."""
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            stack.enter_context(locks.hold(folder, job))
        yield


def writes_out(job: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a job that writes into its keyword `out`: it holds that folder (`writing`)."""

    @functools.wraps(job)
    def holding(*args: Any, out: epath.PathLike, **kw: Any) -> Any:
        with writing(out, job.__name__):
            return job(*args, out=out, **kw)

    return holding


def is_lost_peer(error: BaseException) -> bool:
    """True if an error was caused by the loss of another process.

    Its type and status code are those of a collective's error. Collectives raise the same for
    other reasons, so a barrier decides: an error in all processes is a bug, and all reach it.
    """
    if not jax.distributed.is_initialized() or isinstance(error, UserError):
        return False
    if not isinstance(error, jax.errors.JaxRuntimeError | ValueError):
        return False
    if not _STATUS.match(str(error)):
        return False
    try:
        multihost.get_barrier_sync_fn()(key="dmpo_jax: who is left", timeout_ms=1000 * ANSWER)
    except Exception:
        return True
    return False


def end(status: int, words: str) -> NoReturn:
    """Prints `words` and ends this process; in a multi-process run, all processes.

    Otherwise the others would wait, in a collective or for a file: until `heartbeat` if this
    process is gone, for ever if it waits for them in turn.
    """
    if not _joined.is_set():
        _say(words)
        sys.exit(status)
    abort(status, words)


def abort(status: int, words: str) -> NoReturn:
    """Ends as `end`, from any thread and at once: without cleanup."""
    _say(words)
    if _joined.is_set():
        with contextlib.suppress(Exception):  # another was first, or the coordinator is gone
            told = json.dumps([jax_internals.process_index(), status, words.splitlines()[-1]])
            jax_internals.store().key_value_set(_FAILED, told)
    _leave(status)


def end_for_lost_peer(error: BaseException) -> NoReturn:
    """Ends with RESTART. If the lost process recorded its reason, `_watch` ends this one first."""
    end(
        RESTART,
        f"another process was lost ({_first_line(error)}): run the same command again to go on "
        "from the newest checkpoint",
    )


def _watch(client: Any, index: int) -> None:
    """Ends this process when another one has recorded that it failed."""
    while True:
        time.sleep(INTERVAL)
        try:
            found = client.key_value_try_get(_FAILED)
        except Exception as error:
            if "NOT_FOUND" in str(error):
                continue
            return  # the coordinator is gone, at the end or by a fault: JAX handles it
        who, status, words = json.loads(found)
        if who == index:
            return
        _say(f"process {who} has failed, so this one ends: {words}")
        _leave(status)


def _give_up(peers: Peers, limit: int) -> None:
    address = peers.coordinator or "the coordinator"
    if peers.process_id == 0:
        what = f"not all of the {peers.processes} processes have come to {address}"
    elif peers.coordinator and not _answers(peers.coordinator):
        what = f"process 0 does not answer at {address}"
    else:
        what = f"not all of the {peers.processes} processes have come to {address}"
    abort(
        RESTART,
        f"{what} within {limit} s (distributed.join_limit): is every process started, with the "
        "same coordinator and number of processes, and may they reach that port?",
    )


def _check_port(address: str) -> None:
    """Ends with RESTART if another program listens on the coordinator's port, where JAX crashes."""
    port = int(address.rpartition(":")[2])
    with socket.socket() as probe:
        # As for JAX's own server, a connection that has just been closed does not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            end(
                RESTART,
                f"process 0 cannot listen on port {port} of distributed.coordinator: "
                f"{error.strerror}. Is another run on this machine, or still ending? If not, "
                "choose another port",
            )


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except OSError:
        return False
    return True


def _leave(status: int) -> NoReturn:
    if _joined.is_set() and jax_internals.process_index() == 0:
        time.sleep(3 * INTERVAL)  # the store ends with process 0; the others must read it first
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # no exit handlers: JAX's would wait for the other processes


def _say(words: str) -> None:
    print(printable(words), file=sys.stderr, flush=True)


def _integer(environ: Mapping[str, str], name: str, unset: int) -> int:
    text = environ.get(name, "")
    if not text:
        return unset
    if not text.isdigit():
        raise UserError(f"{name} must be a whole number, but got {text!r}")
    return int(text)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:300]
