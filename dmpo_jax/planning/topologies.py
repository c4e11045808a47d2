"""The devices that a plan is for: TPU slices and GPUs that may be absent, or this machine's."""

import contextlib
import importlib.util
import re
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import topologies as jax_topologies

from dmpo_jax.errors import UserError
from dmpo_jax.extras import install_hint
from dmpo_jax.parallel import jax_internals
from dmpo_jax.planning import chips
from dmpo_jax.planning.cards import Card, load_cards, target_config

TPUS = tuple(chips.TPUS)
PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")  # XLA's GPU compiler; either has it
EXAMPLES = "v5p:2x2x1, v5e:4x4, h100:8, gpu:8, cpu:8"


def is_slice(topology: str) -> bool:
    """True for a TPU slice, which libtpu compiles for."""
    return topology.partition(":")[0] in TPUS


def is_card(topology: str) -> bool:
    """True for GPUs of a description in cards/, which need not be in this machine."""
    return topology.partition(":")[0] in load_cards()


def check_topology(topology: str) -> None:
    """Raises ValueError if this is no topology, or its compiler is not installed."""
    kind, _, shape = topology.partition(":")
    if is_slice(topology) and re.fullmatch(r"\d+(x\d+){1,2}", shape):
        if importlib.util.find_spec("libtpu") is None:
            raise UserError(f"{topology} needs the TPU compiler, not a TPU: {install_hint('plan')}")
        return
    counted = is_card(topology) or kind in ("cpu", "gpu")
    if not counted or not shape.isdecimal() or int(shape) < 1:
        raise UserError(
            f"a topology is one of {', '.join(TPUS)} with a slice's shape (v5e:4x4, v5p:2x2x1), "
            f"one of {', '.join(load_cards())} with a count (h100:8), or gpu:N, cpu:N of this "
            f"machine, but got {topology!r}"
        )
    if is_card(topology):
        _hosts(topology)
        if not any(importlib.util.find_spec(name) for name in PLUGINS):
            raise UserError(
                f"{topology} needs XLA's compiler for GPUs, not a GPU: {install_hint('plan-gpu')}"
            )


def open_devices(topology: str) -> list[Any]:
    """Returns the devices of a topology, present or not.

    Raises:
        ValueError: the compiler does not know the slice, its version is not JAX's, or this
            machine has too few devices.
    """
    kind, _, shape = topology.partition(":")
    if is_slice(topology):
        try:
            found = jax_topologies.get_topology_desc(platform="tpu", topology_name=topology)
        except Exception as error:  # libtpu raises many types
            raise UserError(f"the TPU compiler has no {topology}: {error}") from error
        return list(found.devices)
    count = int(shape)
    if is_card(topology):
        hosts, libraries = _hosts(topology), _libraries(topology)
        try:
            found = jax_topologies.get_topology_desc(
                platform="cuda",
                topology=f"1x{hosts}x{count // hosts}",
                target_config=target_config(load_cards()[kind], **libraries),
            )
        except Exception as error:  # the plugin raises many types
            raise UserError(
                f"the GPU compiler does not take {topology}; its version must be that of JAX "
                f"({jax.__version__}): {install_hint('plan-gpu')}. It says: {error}"
            ) from error
        return list(found.devices)
    try:
        devices = jax.devices(kind)
    except RuntimeError:
        devices = []
    if len(devices) < count:
        raise UserError(
            f"{topology} is compiled by the machine itself, and this one has {len(devices)} such "
            f"devices where {count} are needed: plan there, or for devices that need not be there: "
            f"a TPU slice, or {', '.join(load_cards())} by count"
        )
    return devices[:count]


@contextlib.contextmanager
def tracing_for(topology: str) -> Iterator[None]:
    """Within it, a step may be traced and lowered for a topology's devices.

    JAX asks this machine for its cuDNN when it traces attention. The plugin's own version stands
    in for cards that are absent; nothing of cuDNN runs.
    """
    if not is_card(topology):
        yield
        return
    with jax_internals.assumed_cudnn(_libraries(topology)["cudnn"]):
        yield


def _hosts(topology: str) -> int:
    """Returns the number of hosts of a topology of cards.

    Raises:
        ValueError: the count does not fill hosts, or nothing is known of what joins them.
    """
    kind, _, shape = topology.partition(":")
    card: Card = load_cards()[kind]
    count = int(shape)
    if count <= card.host:
        return 1
    if count % card.host:
        raise UserError(
            f"a host has {card.host} {kind}, so more of them are a multiple of {card.host}, but "
            f"got {topology!r}"
        )
    if card.network is None:
        raise UserError(
            f"the network between hosts of {kind} is not known: give {kind}:{card.host} or fewer, "
            f"but got {topology!r}"
        )
    return count // card.host


def _libraries(topology: str) -> dict[str, int]:
    """Returns the versions of CUDA's libraries that the plugin was built with."""
    found = jax_internals.cuda_versions()
    if found is None:
        raise UserError(
            f"{topology} needs a GPU compiler of JAX's own version ({jax.__version__}): "
            f"{install_hint('plan-gpu')}"
        )
    return found
