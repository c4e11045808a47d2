"""Compiles a training step for chips that may be absent, and reports its memory, FLOPs and time."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

from dmpo_jax.errors import UserError
from dmpo_jax.planning import cards, chips, flops, hlo
from dmpo_jax.planning import report as plan_report
from dmpo_jax.planning.step import Model, Planned, make_planned
from dmpo_jax.planning.topologies import (
    EXAMPLES,
    check_topology,
    is_card,
    open_devices,
    tracing_for,
)
from dmpo_jax.progress import reported
from dmpo_jax.training.build import StepSettings

LOG = logging.getLogger(__name__)
PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin")


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
        topologies: "v5p:4x4x4" and the like, compiled by libtpu, which needs no TPU; "h100:8" and
            the like, compiled by JAX's CUDA plugin, which needs no GPU; "gpu:8" or "cpu:8", that
            many of this machine's own. The caller sets the platforms that JAX may search for
            (`jobs.plan.prepare_process`).
        steps: updates of the run.
        cache: a folder that keeps plans by settings, topology, versions and source; "" is the
            user's cache.

    Raises:
        ValueError: a topology is not available here, or the settings do not fit it.
    """
    if not topologies:
        raise UserError(f"--topology must name at least one: {EXAMPLES}")
    for topology in topologies:
        check_topology(topology)
    folder = epath.Path(cache) if cache else _cache_folder()
    plans = []
    for topology in topologies:
        known = plan_identity(model, settings, axes, topology, steps)
        remembered = folder / f"{hash_identity(known)}.json"
        if remembered.exists():
            LOG.info("%s: planned before, %s", topology, remembered)
            plans.append(json.loads(remembered.read_text()))
            continue
        plans.append(plan_one(model, settings, axes, topology, steps=steps))
        remembered.parent.mkdir(parents=True, exist_ok=True)
        remembered.write_text(json.dumps(plans[-1], indent=1))
    return plans


def plan_one(
    model: Model, settings: StepSettings, axes: Mapping[str, int], topology: str, *, steps: int
) -> dict[str, Any]:
    """Compiles and returns the plan of one topology."""
    planned = make_planned(model, settings, axes, open_devices(topology))
    grid, began = planned.built.mesh, time.monotonic()
    with jax.set_mesh(grid), tracing_for(topology), reported(f"{topology}: tracing"):
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
        **describe(planned, program, executed, needed, steps=steps, absent=is_card(topology)),
        "lower_seconds": lowering,
        "compile_seconds": time.monotonic() - began,
        "versions": versions(),
    }


def describe(
    planned: Planned,
    program: Any,
    executed: int,
    needed: int | None,
    *,
    steps: int,
    absent: bool = False,
) -> dict[str, Any]:
    """Returns the numbers of a compiled program, or those known without it if it did not fit.

    executed: FLOPs of the traced step. needed: bytes per chip of a program that did not fit.
    steps: updates of the run. absent: the devices are GPUs of a description.
    """
    settings, grid = planned.built.settings, planned.built.mesh
    first, count = grid.devices.flat[0], grid.size
    chip = chips.lookup(first.device_kind)
    on_gpu = first.platform == "gpu"
    if chip is not None and on_gpu:
        chip = chips.over_hosts(chip, len({one.process_index for one in grid.devices.flat}))
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
        xla = _xla(program) | {"traffic_with_loops": traffic, "kernels": hlo.kernels(text)}
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
        "notes": plan_report.note_gpu(memory, limit, absent=absent) if on_gpu else [],
        "flops": {"pair": planned.pair_flops, "chip": useful, "chip_executed": executed / count},
        "collectives": rows,
        "time": modelled,
        "bound_by": plan_report.bound_by(modelled),
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


def hash_identity(known: Mapping[str, Any]) -> str:
    """Returns a hash of `plan_identity`."""
    text = json.dumps(known, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


@functools.cache
def versions() -> dict[str, str]:
    """Returns the versions of the compiling packages, and a hash of this package's source."""
    found = {"source": source_hash()}
    for name in ("jax", "jaxlib", "libtpu", *PLUGINS, "flax", "optax"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found


def source_hash() -> str:
    """Returns a hash of the package's Python and cards: a plan is valid for one source."""
    root, digest = pathlib.Path(__file__).parents[1], hashlib.sha256()
    for path in sorted([*root.rglob("*.py"), *cards.FOLDER.glob("*.toml")]):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _cache_folder() -> epath.Path:
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return epath.Path(folder) / "dmpo_jax" / "plans"
