"""Evaluates a compiled step: memory against the chip's, modelled time, suggested changes."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from dmpo_jax.errors import UserError
from dmpo_jax.parallel import meshes
from dmpo_jax.planning import chips, hlo
from dmpo_jax.training.build import COMPUTE, StepSettings

GB = 1e9
ASSUMPTIONS = (
    "A model, not a measurement. FLOPs are the program's, recomputation included, at the chip's "
    "published bfloat16 rate; memory traffic is what each kernel reads and writes, loops counted; "
    "collectives are rings over all of a chip's links. Lower end: all three overlap wholly. Upper "
    "end: collectives overlap with nothing. Real kernels reach less than the published rates."
)
ABSENT_GPU = (
    "compiled for a GPU that is not there: nothing was tuned on it, so its kernels may be others, "
    "and the workspaces of cuDNN, chosen on the card, are not in the temporaries"
)
JAX_SHARE = 0.75  # of a GPU's memory, which JAX takes unless it is told otherwise


class Memory(NamedTuple):
    """Bytes per chip.

    arguments: state, reference and batch; the new state is written in place. temporaries: held
    beside them at the step's peak; outputs: those not in place; code: the program.
    """

    arguments: int
    temporaries: int
    outputs: int
    code: int

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries + self.outputs + self.code


class Parts(NamedTuple):
    """Bytes per chip of a step's arguments, and of the gradients among its temporaries.

    All gradients are held at once: their norm decides whether the update is made.
    """

    params: int
    optimizer: int
    ema: int
    reference: int
    batch: int
    sharded: int  # of all but the batch: a larger fsdp divides it
    gradients: int = 0


def measure_memory(compiled: Any) -> Memory:
    analysis = compiled.memory_analysis()
    given_back = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return Memory(
        analysis.argument_size_in_bytes,
        analysis.temp_size_in_bytes,
        max(given_back, 0),
        analysis.generated_code_size_in_bytes,
    )


def local_bytes(tree: Any) -> int:
    """Returns the bytes per chip of shapes with shardings."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def count_parts(arguments: tuple[Any, ...]) -> Parts:
    state, reference, batch, _ = arguments
    kept = [x for x in jax.tree.leaves((state, reference)) if "fsdp" in str(x.sharding.spec)]
    return Parts(
        local_bytes(state.params),
        local_bytes(state.opt_state),
        local_bytes(state.ema),
        local_bytes((reference, state.moving)),
        local_bytes(batch),
        local_bytes(kept),
        local_bytes(state.params),  # of the same shapes and dtype
    )


def parameter_shapes(arguments: tuple[Any, ...]) -> list[tuple[int, ...]]:
    """Returns the unsharded shapes of all parameters, and the sizes of their "tensor" parts."""
    state, reference, _, _ = arguments
    shapes = []
    for x in jax.tree.leaves((state.params, reference)):
        shapes.append(x.shape)
        if (tensor := dict(x.sharding.mesh.shape).get("tensor", 1)) > 1:
            shapes.append((int(np.prod(x.shape)) // tensor,))
    return shapes


def summarise(found: list[hlo.Collective]) -> list[dict[str, Any]]:
    """Returns one row for each kind, `moves` and group size; bytes and runs per step and chip."""
    rows: dict[tuple, dict[str, Any]] = {}
    for one in found:
        empty = {"instructions": 0, "runs": 0, "payload_bytes": 0, "moved_bytes": 0}
        row = rows.setdefault((one.kind, one.moves, one.group), empty)
        row["instructions"] += 1
        row["runs"] += one.trips
        row["payload_bytes"] += one.trips * one.payload
        row["moved_bytes"] += one.trips * one.moved
    names = ("kind", "moves", "group")
    return [{**dict(zip(names, key, strict=True)), **row} for key, row in sorted(rows.items())]


def model_time(
    chip: chips.Chip | None, *, flops: float | int, traffic: float | int, moved: float | int
) -> dict[str, float] | None:
    """Returns seconds per step by each limit, and their lower and upper combination.

    None if the chip's rates are unknown.
    """
    if chip is None:
        return None
    compute, memory = flops / chip.flops, traffic / chip.bandwidth
    links = moved / chip.interconnect
    return {
        "compute": compute,
        "memory": memory,
        "interconnect": links,
        "low": max(compute, memory, links),
        "high": max(compute, memory) + links,
    }


def bound_by(time: Mapping[str, float] | None) -> str | None:
    """Returns the limit that takes longest: "compute", "memory" or "interconnect"."""
    if time is None:
        return None
    return max(("compute", "memory", "interconnect"), key=lambda limit: time[limit])


def note_gpu(memory: Memory, limit: float | int | None, *, absent: bool) -> list[str]:
    """Returns what to know of a plan for GPUs. absent: the cards are of a description."""
    notes = [ABSENT_GPU] if absent else []
    if limit is not None and JAX_SHARE * limit < memory.total <= limit:
        notes.append(
            f"JAX takes {JAX_SHARE:.0%} of a GPU's memory unless told otherwise, "
            f"{JAX_SHARE * limit / GB:.0f} GB here: set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95"
        )
    return notes


def suggest(
    settings: StepSettings,
    *,
    memory: Memory,
    parts: Parts,
    limit: float | int,
    mesh: Mapping[str, int],
) -> list[str]:
    """Suggests config changes that bring a step below `limit` bytes per chip, each alone if it can.

    Estimates: arguments by their parts; temporaries in proportion to a microbatch's rows, except
    the gradients, which do not depend on it.
    """
    over = memory.total - limit
    if over <= 0:
        return []
    lines = [f"{over / GB:.1f} GB too much a chip. Estimated, each change alone:"]
    for change, saved in _changes(settings, memory=memory, parts=parts, over=over, mesh=mesh):
        if saved <= 0:
            continue
        left = memory.total - saved
        verdict = "fits" if left <= limit else "not enough alone"
        lines.append(f"  {change}: saves {saved / GB:.1f} GB, {left / GB:.1f} GB: {verdict}")
    if settings.execution.remat == "none":
        lines.append("  model.remat=transformer: temporaries shrink; how far, only a plan tells")
    return lines


@contextlib.contextmanager
def memory_advice(settings: StepSettings, axes: Mapping[str, Any]) -> Iterator[None]:
    """Raises UserError, naming what to change, where the block runs out of a device's memory.

    axes: of the mesh, as `meshes.make_mesh` takes them.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        needed = bytes_needed(error)
        if needed is None:
            raise
        much = f" of {needed / GB:.1f} GB" if needed else ""
        lines = [f"the device's memory does not suffice{much}. Each of these needs less of it:"]
        lines += leaner(settings, meshes.make_mesh(**axes))
        lines.append(
            "dmpo-jax plan --config=... --topology=gpu:N, h100:N or v5p:2x2x1 says how much each."
        )
        raise UserError("\n".join(lines)) from error


def leaner(settings: StepSettings, mesh: jax.sharding.Mesh, cut: bool = True) -> Iterator[str]:
    """Yields a line for each option that makes a step need less memory, the cheapest first.

    cut: name train.accumulation too.
    """
    more = [n for n in cuts(settings.batch_size, mesh, settings.group) if n > settings.accumulation]
    if cut and more:
        yield f"  --config.train.accumulation={more[0]}, or auto  (same result, more time)"
    if settings.execution.remat == "none":
        yield "  --config.model.remat=transformer  (same result, more time)"
    if mesh.size > mesh.shape["fsdp"] * mesh.shape["tensor"]:
        yield "  --config.mesh.data=1 --config.mesh.fsdp=-1  (devices share the state)"
    if settings.optimizer.get("name") == "adamw":
        yield "  --config.optimizer.name=adamw_bf16 or adafactor  (another run)"
    if settings.lora is None:
        yield "  --config.lora.rank=64  (another run: adapters alone)"
    elif settings.frozen_dtype == COMPUTE:
        yield "  --config.model.frozen_dtype=int8  (another run: the base rounded)"
    yield f"  --config.train.batch_size below {settings.batch_size}  (another run)"
    yield "  a lower data.resolution  (another run, of pairs that are encoded anew)"


def cuts(batch_size: int, mesh: jax.sharding.Mesh, group: int | None = None) -> list[int]:
    """Returns the numbers of microbatches that a batch can be cut into on a mesh, ascending."""
    rows = batch_size // (meshes.batch_shares(mesh) * (group or 1))
    return [n for n in range(1, rows + 1) if rows % n == 0]


def bytes_needed(error: Exception) -> int | None:
    """Returns the bytes per chip that a program needed if it ran out of memory, else None.

    0 if the error does not state them.
    """
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text and "Ran out of memory" not in text:
        return None
    used = re.search(r"[Uu]sed ([\d.]+)([KMG])i? of", text)
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return int(float(used[1]) * units[used[2]]) if used else 0


def _changes(
    settings: StepSettings,
    *,
    memory: Memory,
    parts: Parts,
    over: float | int,
    mesh: Mapping[str, int],
) -> Iterator[tuple[str, float]]:
    """Yields (the change, bytes per chip that it saves)."""
    fsdp, data = mesh["fsdp"], mesh["data"]
    whole = parts.params + parts.optimizer + parts.ema + parts.reference
    if data > 1:
        # Nothing is sharded yet: nearly everything would be.
        sharded = parts.sharded or 0.98 * whole
        sharded += parts.params * sharded / max(whole, 1)  # gradients are sharded likewise
        more = [fsdp * n for n in range(2, data + 1) if data % n == 0]
        savings = [(size, sharded * (1 - fsdp / size)) for size in more]
        enough = [one for one in savings if one[1] >= over]
        size, saved = min(enough) if enough else savings[-1]
        yield f"mesh.fsdp={size}", saved
    rows = settings.batch_size // (data * fsdp * (settings.group or 1))
    cuts = [n for n in range(2, rows + 1) if rows % n == 0 and n > settings.accumulation]
    if cuts:
        fixed = min(parts.params * (2 if settings.accumulation > 1 else 1), memory.temporaries)
        moving = memory.temporaries - fixed

        def saving(n: int) -> float:
            return moving * (1 - settings.accumulation / n) - (
                parts.params if settings.accumulation == 1 else 0
            )

        enough = [n for n in cuts if saving(n) >= over]
        cut = enough[0] if enough else cuts[-1]
        yield f"train.accumulation={cut}", saving(cut)
    if settings.ema_decay:
        yield "train.ema_decay=0", parts.ema
    if settings.lora is not None and settings.frozen_dtype == COMPUTE:
        width = np.dtype(settings.compute_dtype).itemsize
        yield "model.frozen_dtype=int8", 0.97 * parts.reference * (1 - 1 / width)
    if settings.lora is None:
        if settings.optimizer.get("name", "adamw") == "adamw":
            yield "optimizer.name=adafactor", 0.98 * parts.optimizer
        # The frozen base stays, in the compute dtype; adapters are a few percent of it.
        gone = parts.params + parts.optimizer + parts.ema
        frozen = 0 if parts.reference else parts.params // 2
        yield "lora.rank=64", 0.94 * gone - frozen


def printed(plans: list[dict[str, Any]]) -> str:
    """Formats the plans as a Markdown table, followed by details of each."""
    head = (
        "topology",
        "chips",
        "mesh",
        "pairs/chip",
        "arguments GB",
        "temporaries GB",
        "total GB",
        "of GB",
        "fits",
        "TFLOP/chip",
        "step s (model)",
        "MFU at that",
        "days",
        "chip-hours",
        "XLA's s",
    )
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(_row(plan)) + " |" for plan in plans]
    for plan in plans:
        lines += ["", f"{plan['topology']}: compiled in {plan['compile_seconds']:.0f} s"]
        lines += [f"  {line}" for line in (*plan["advice"], *plan["notes"])]
        lines += [f"  {_roofline(plan)}"] if plan["time"] else []
        for row in plan["collectives"] or []:
            lines.append(
                f"  {row['kind']} of {row['moves']}, {row['group']} chips: "
                f"{row['instructions']} in the program, {row['runs']} a step, "
                f"{row['payload_bytes'] / GB:.3f} GB whole, {row['moved_bytes'] / GB:.3f} GB sent"
            )
    lines += ["", ASSUMPTIONS]
    lines.append(
        "XLA's s: the compiler's own estimate (optimal_seconds); it counts a loop's body once."
    )
    return "\n".join(lines)


def _roofline(plan: Mapping[str, Any]) -> str:
    """Says what a step takes by each limit, and which it is bound by."""
    time, traffic = plan["time"], plan["xla"]["traffic_with_loops"]
    executed = plan["flops"]["chip_executed"]
    words = {"compute": "products", "memory": "memory traffic", "interconnect": "collectives"}
    return (
        f"bound by {words[plan['bound_by']]}: {executed / 1e12:.1f} TFLOP {time['compute']:.3f} s, "
        f"{traffic / GB:.0f} GB of memory traffic {time['memory']:.3f} s, "
        f"collectives {time['interconnect']:.3f} s; "
        f"{plan['xla']['kernels']:,} kernels started a step"
    )


def _row(plan: Mapping[str, Any]) -> list[str]:
    memory, time, run = plan["memory"], plan["time"], plan["run"]

    def between(low: float, high: float, places: int) -> str:
        texts = [f"{x:.{places}f}" for x in (low, high)]
        return texts[0] if texts[0] == texts[1] else "-".join(texts)

    def gigabytes(key: str) -> str:
        return "?" if memory[key] is None else f"{memory[key] / GB:.2f}"

    modelled = ["?"] * 4
    if time:
        modelled = [
            between(time["low"], time["high"], 3),
            between(100 * plan["mfu"]["high"], 100 * plan["mfu"]["low"], 0) + " %",
            between(run["days"]["low"], run["days"]["high"], 2),
            between(run["chip_hours"]["low"], run["chip_hours"]["high"], 0),
        ]
    fits = {True: "yes", False: "NO", None: "?"}[memory["fits"]]
    limit = "?" if memory["limit"] is None else f"{memory['limit'] / GB:.0f}"
    xla = plan["xla"].get("optimal_seconds")
    return [
        plan["topology"],
        str(plan["chips"]),
        " x ".join(str(size) for size in plan["mesh"].values()),
        f"{plan['pairs_per_chip']:g}",
        gigabytes("arguments"),
        gigabytes("temporaries"),
        gigabytes("total"),
        limit,
        fits,
        f"{plan['flops']['chip'] / 1e12:.2f}",
        *modelled,
        "?" if xla is None else f"{xla:.3f}",
    ]
