"""Many processes of one program: how they find one another, and how all end where one fails.

The statuses that a process ends with, for whatever launched it to act on:

    0     the work is done
    1     an error, which running again would repeat
    75    RESTART: a process was lost or hangs, or they did not find one another
    130   Ctrl-C in a run on one process: saved
    143   SIGTERM: saved (Ctrl-C in a run on many processes too)
    134, 137 and others above 128: ended by JAX on losing a process, or by the system

Run the same command again on 75 and on all above 128 but 130.
"""

import contextlib
import json
import logging
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import jax
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from dmpo_jax.errors import UserError
from dmpo_jax.parallel import jax_internals

LOG = logging.getLogger(__name__)
RESTART = 75  # EX_TEMPFAIL of sysexits.h: "the user is invited to retry"
INTERVAL = 1.0  # seconds between two looks for another process's failure
_joined = threading.Event()  # by `join`, so that there is a store and someone looks into it
_FAILED = "dmpo_jax/failed"  # where in the coordinator's store a failure is told
ANSWER = 10  # seconds within which a process that is not lost comes to a barrier
# What collectives raise where another process is gone; gloo's errors are ValueErrors.
_MAY_BE_LOST = (jax.errors.JaxRuntimeError, ValueError)


class Peers(NamedTuple):
    """The processes of a job. What is None, JAX asks of the cluster."""

    coordinator: str | None  # HOST:PORT of process 0
    processes: int
    process_id: int | None
    where: str  # who said so


def join(
    *,
    coordinator: str = "",
    processes: int = 0,
    process_id: int = -1,
    join_limit: int = 300,
    heartbeat: int = 100,
) -> None:
    """Makes this process one of several, where it is one; before anything asks for a device.

    Settings come from the arguments, else from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID, else from the cluster: SLURM, Cloud TPU slices, GKE, Kubernetes' indexed
    jobs, Open MPI. Does nothing for one process, nor where it was done already.

    Args:
        coordinator: HOST:PORT that process 0 listens on and all others can reach.
        processes: how many there are; 0 is unset, 1 asks no cluster.
        process_id: which of them this is; -1 is unset.
        join_limit: seconds after which the process ends, with RESTART, if not all have come.
        heartbeat: seconds without a sign of life after which a process counts as dead. JAX
            then aborts the others (status 134).

    Raises:
        UserError: the settings are not whole, or contradict one another.
    """
    if jax.distributed.is_initialized():
        return
    peers = find_peers(coordinator, processes, process_id, os.environ)
    if peers is None:
        return
    LOG.info("one of %d processes (%s)", peers.processes, peers.where)
    alarm = threading.Timer(join_limit, _give_up, (peers, join_limit))
    alarm.daemon = True
    alarm.start()
    # All is known, but under SLURM which GPU of the node is this task's.
    known = None not in peers and "SLURM_LOCALID" not in os.environ
    try:
        jax.distributed.initialize(
            peers.coordinator,
            peers.processes,
            peers.process_id,
            local_device_ids=local_devices(os.environ),
            cluster_detection_method="deactivate" if known else None,
            # Longer than ours: at its own limit JAX aborts with a page of C++ frames.
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


def find_peers(
    coordinator: str, processes: int, process_id: int, environ: Mapping[str, str]
) -> Peers | None:
    """The processes of this job by settings, environment or cluster; None if it is one.

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
    """Which GPUs are this process's own; None leaves it to JAX.

    Under SLURM JAX gives each task the one GPU of its number on the node. A task that is
    alone on its node would so leave all but one idle: it takes all that it sees.
    """
    alone = re.fullmatch(r"1(\(x\d+\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    visible = list(filter(None, environ.get("CUDA_VISIBLE_DEVICES", "").split(",")))
    if alone and len(visible) > 1 and "JAX_LOCAL_DEVICE_IDS" not in environ:
        return list(range(len(visible)))
    return None


def barrier(name: str) -> None:
    """Returns when every process has come to `name`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"dmpo_jax: {name}")


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error came of a process that is gone.

    Collectives then raise what they raise for other reasons too, so the others are asked: an
    error that all have is a bug, and all come to the barrier.
    """
    if not jax.distributed.is_initialized() or isinstance(error, UserError):
        return False
    if not isinstance(error, _MAY_BE_LOST):
        return False
    try:
        multihost.get_barrier_sync_fn()(key="dmpo_jax: who is left", timeout_ms=1000 * ANSWER)
    except Exception:
        return True
    return False


def end(status: int, words: str) -> NoReturn:
    """Ends this process, after its words; where it is one of many, all of them.

    The others would else wait, in a collective or for a file, for what never comes: until
    `heartbeat` if this process is gone, for ever if it waits for them in turn.
    """
    if not _joined.is_set():
        print(words, file=sys.stderr, flush=True)
        sys.exit(status)
    abort(status, words)


def abort(status: int, words: str) -> NoReturn:
    """`end` from any thread, at once: nothing is cleaned up."""
    print(words, file=sys.stderr, flush=True)
    if _joined.is_set():
        with contextlib.suppress(Exception):  # another told first, or the coordinator is gone
            told = json.dumps([jax_internals.process_index(), status, words.splitlines()[-1]])
            jax_internals.store().key_value_set(_FAILED, told)
    _leave(status)


def end_for_lost_peer(error: BaseException) -> NoReturn:
    """`end` where `is_lost_peer`. Where the lost one has told why, `_watch` was quicker."""
    end(
        RESTART,
        f"another process was lost ({_first_line(error)}): run the same command again to go on "
        "from the newest checkpoint",
    )


def _watch(client: Any, index: int) -> None:
    """Ends this process when another one has told that it failed."""
    while True:
        time.sleep(INTERVAL)
        try:
            found = client.key_value_try_get(_FAILED)
        except Exception as error:
            if "NOT_FOUND" in str(error):
                continue
            return  # the coordinator is gone, at the end or by a fault: JAX sees to it
        who, status, words = json.loads(found)
        if who == index:
            return
        print(f"process {who} has failed, so this one ends: {words}", file=sys.stderr, flush=True)
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


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except OSError:
        return False
    return True


def _leave(status: int) -> NoReturn:
    if _joined.is_set() and jax_internals.process_index() == 0:
        time.sleep(3 * INTERVAL)  # with it goes the store, which the others must have read
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # no exit handlers: JAX's would wait for the other processes


def _integer(environ: Mapping[str, str], name: str, unset: int) -> int:
    text = environ.get(name, "")
    if not text:
        return unset
    if not text.isdigit():
        raise UserError(f"{name} must be a whole number, but got {text!r}")
    return int(text)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:300]
