"""Compiles a training step for chips that may be absent, and reports its memory, FLOPs and time."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import pathlib
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

from dmpo_jax.errors import UserError
from dmpo_jax.extras import install_hint
from dmpo_jax.planning import chips, flops, hlo
from dmpo_jax.planning import report as plan_report
from dmpo_jax.planning.step import Model, Planned, make_planned
from dmpo_jax.progress import reported
from dmpo_jax.training.build import StepSettings

LOG = logging.getLogger(__name__)
TPUS = tuple(name for name in chips.CHIPS if name.startswith("v"))


def plan(
    model: Model,
    settings: StepSettings,
    axes: Mapping[str, int],
    topologies: Sequence[str],
    *,
    steps: int,
    cache: epath.PathLike = "",
) -> list[dict[str, Any]]:
    """Returns a plan for each topology: memory per chip, FLOPs, collectives, a model of the time.

    Args:
        model: shapes, from `step.of_published` or `step.of_folder`. axes: of the mesh.
        topologies: "v5p:4x4x4" and the like, compiled by libtpu, which needs no TPU; "gpu:8" or
            "cpu:8", that many of this machine's own. The caller sets the platforms that JAX may
            search for (`jobs.plan.prepare_process`).
        steps: updates of the run.
        cache: a folder that keeps plans by settings, topology, versions and source; "" is the
            user's cache.

    Raises:
        ValueError: a topology is not available here, or the settings do not fit it.
    """
    if not topologies:
        raise UserError("--topology must name at least one: v5p:2x2x1, v5e:4x4, gpu:8, cpu:8")
    for topology in topologies:
        check_topology(topology)
    folder = epath.Path(cache) if cache else _cache_folder()
    plans = []
    for topology in topologies:
        known = plan_identity(model, settings, axes, topology, steps)
        remembered = folder / f"{_hash(known)}.json"
        if remembered.exists():
            LOG.info("%s: planned before, %s", topology, remembered)
            plans.append(json.loads(remembered.read_text()))
            continue
        plans.append(plan_one(model, settings, axes, topology, steps=steps))
        remembered.parent.mkdir(parents=True, exist_ok=True)
        remembered.write_text(json.dumps(plans[-1], indent=1))
    return plans


def check_topology(topology: str) -> None:
    """Raises ValueError if this is no topology, or its compiler is not installed."""
    kind, _, shape = topology.partition(":")
    if kind in TPUS and re.fullmatch(r"\d+(x\d+){1,2}", shape):
        if importlib.util.find_spec("libtpu") is None:
            raise UserError(f"{topology} needs the TPU compiler, not a TPU: {install_hint('plan')}")
        return
    if kind not in ("cpu", "gpu") or not shape.isdigit() or int(shape) < 1:
        raise UserError(
            f"a topology is one of {', '.join(TPUS)} with a slice's shape (v5e:4x4, v5p:2x2x1), or "
            f"gpu:N, cpu:N of this machine, but got {topology!r}"
        )


def open_devices(topology: str) -> list[Any]:
    """Returns the devices of a topology, present or not.

    Raises:
        ValueError: the compiler does not know the slice, or this machine has too few devices.
    """
    kind, _, shape = topology.partition(":")
    if kind in TPUS:
        from jax.experimental import topologies as tpu_topologies

        try:
            found = tpu_topologies.get_topology_desc(platform="tpu", topology_name=topology)
        except Exception as error:  # libtpu raises many types
            raise UserError(f"the TPU compiler has no {topology}: {error}") from error
        return list(found.devices)
    count = int(shape)
    try:
        devices = jax.devices(kind)
    except RuntimeError:
        devices = []
    if len(devices) < count:
        raise UserError(
            f"{topology} is compiled by the machine itself, and this one has {len(devices)} such "
            f"devices where {count} are needed: plan there, or for a TPU slice, which need not be "
            "there"
        )
    return devices[:count]


def plan_one(
    model: Model, settings: StepSettings, axes: Mapping[str, int], topology: str, *, steps: int
) -> dict[str, Any]:
    """Compiles and returns the plan of one topology."""
    planned = make_planned(model, settings, axes, open_devices(topology))
    grid, began = planned.built.mesh, time.monotonic()
    with jax.set_mesh(grid), reported(f"{topology}: tracing"):
        traced = planned.update.trace(*planned.arguments)
        lowered = traced.lower()
    executed = flops.jaxpr_flops(traced.jaxpr)
    lowering, began = time.monotonic() - began, time.monotonic()
    program, needed = None, None
    with jax.set_mesh(grid), reported(f"{topology}: compiling"):
        try:
            program = lowered.compile()
        except Exception as error:
            needed = plan_report.bytes_needed(error)
            if needed is None:
                raise
    return {
        "topology": topology,
        "model": model.name,
        **describe(planned, program, executed, needed, steps=steps),
        "lower_seconds": lowering,
        "compile_seconds": time.monotonic() - began,
        "versions": versions(),
    }


def describe(
    planned: Planned, program: Any, executed: int, needed: int | None, *, steps: int
) -> dict[str, Any]:
    """Returns the numbers of a compiled program, or those known without it if it did not fit.

    executed: FLOPs of the traced step. needed: bytes per chip of a program that did not fit.
    steps: updates of the run.
    """
    settings, grid = planned.built.settings, planned.built.mesh
    first, count = grid.devices.flat[0], grid.size
    chip = chips.lookup(first.device_kind)
    parts = plan_report.count_parts(planned.arguments)
    memory = plan_report.Memory(sum(parts[:5]), 0, 0, 0)
    if needed is not None:
        memory = memory._replace(temporaries=max(needed - memory.arguments, 0))
    rows, modelled, xla = None, None, {}
    if program is not None:
        memory = plan_report.measure_memory(program)
        text = hlo.Program(program.as_text())
        found = hlo.collectives(text, plan_report.parameter_shapes(planned.arguments))
        rows = plan_report.summarise(found)
        traffic, _ = hlo.memory_traffic(text)
        moved = sum(row["moved_bytes"] for row in rows)
        modelled = plan_report.model_time(
            chip, flops=executed / count, traffic=traffic, moved=moved
        )
        xla = _xla(program) | {"traffic_with_loops": traffic}
    limit = None if chip is None else chip.memory
    mesh = {axis: int(size) for axis, size in grid.shape.items()}
    pairs = settings.batch_size
    useful = planned.pair_flops * pairs / count
    advice = []
    if limit is not None:
        advice = plan_report.suggest(settings, memory=memory, parts=parts, limit=limit, mesh=mesh)
    times = {end: modelled[end] for end in ("low", "high")} if modelled else {}
    return {
        "device_kind": first.device_kind,
        "chips": count,
        "mesh": mesh,
        "pairs_per_chip": pairs / count,
        "memory": {
            **memory._asdict(),
            "total": memory.total,
            "limit": limit,
            "fits": None if limit is None else memory.total <= limit,
            "parts": parts._asdict(),
        },
        "advice": advice,
        "flops": {"pair": planned.pair_flops, "chip": useful, "chip_executed": executed / count},
        "collectives": rows,
        "time": modelled,
        "mfu": {end: useful / (t * chip.flops) for end, t in times.items()} if chip else {},
        "run": {
            "steps": steps,
            "days": {end: t * steps / 86400 for end, t in times.items()},
            "chip_hours": {end: t * steps * count / 3600 for end, t in times.items()},
        },
        "xla": xla,
    }


def _xla(program: Any) -> dict[str, float]:
    """Returns the compiler's own estimates, which count a loop's body once; {} if it has none."""
    try:
        costs = program.cost_analysis() or {}
    except Exception:  # not every backend has them, and their errors differ
        return {}
    costs = costs[0] if isinstance(costs, list) else costs
    names = ("flops", "bytes accessed", "optimal_seconds")
    known = {name.replace(" ", "_"): float(costs[name]) for name in names if name in costs}
    # Negative if unknown to the compiler, as seen for steps with loops.
    return {name: value for name, value in known.items() if value >= 0}


def plan_identity(
    model: Model, settings: StepSettings, axes: Mapping[str, int], topology: str, steps: int
) -> dict[str, Any]:
    """Returns everything that a plan depends on."""
    chosen = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return {
        "topology": topology,
        "model": [model.name, dict(model.config), model.meta.to_json(), repr(model.noise)],
        "settings": {**chosen, "objective": settings.objective.name},
        "mesh": dict(axes),
        "steps": steps,
        "versions": versions(),
    }


def _hash(known: Mapping[str, Any]) -> str:
    text = json.dumps(known, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


@functools.cache
def versions() -> dict[str, str]:
    """Returns the versions of the compiling packages, and a hash of this package's source."""
    found = {"source": source_hash()}
    for name in ("jax", "jaxlib", "libtpu", "flax", "optax"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found


def source_hash() -> str:
    """Returns a hash of every Python file of the package: a plan is valid for one source."""
    root, digest = pathlib.Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _cache_folder() -> epath.Path:
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return epath.Path(folder) / "dmpo_jax" / "plans"
