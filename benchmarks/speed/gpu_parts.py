"""Memory traffic of a step of one layer, from XLA's GPU compiler. Needs no GPU.

    python benchmarks/speed/gpu_parts.py                        # every part, a minute each
    python benchmarks/speed/gpu_parts.py feed-forward --label=x # some, under another label
    python benchmarks/speed/gpu_parts.py --table                # earlier results, as a table

Requires the extra [plan-gpu]. A step is a forward by a frozen copy, forward and backward by the
trained layer, and AdamW's update with clipping, in bfloat16 with float32 masters, as of the
training step: what a lever does to a layer is known in a minute, to SD1.5 in many. Results go to
results/gpu_parts.json, by part, topology and label.
"""

import argparse
import json
import pathlib
import types
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dmpo_jax.models import execution, layers, parameters, unet
from dmpo_jax.parallel import layouts, meshes
from dmpo_jax.parallel.placement import over_rows, platform
from dmpo_jax.planning import hlo, report, topologies
from dmpo_jax.training import optim, step

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "gpu_parts.json"


def kernel() -> str:
    """Returns the kernel of attention: cuDNN's on GPUs. Splash compiles on a TPU's mesh alone."""
    return "cudnn" if platform() == "gpu" else "plain"


class Resnet(nnx.Module):
    """SD1.5's resnet of 640 channels, without the time."""

    shape = (8, 32, 32, 640)

    def __init__(self, **kw: Any):
        self.block = layers.ResnetBlock2D(640, 640, None, groups=32, epsilon=1e-5, act="silu", **kw)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.block(x)


class FeedForward(nnx.Module):
    """The feed-forward of SD1.5's largest map, with its norm."""

    shape = (8, 4096, 320)

    def __init__(self, **kw: Any):
        self.norm = layers.layer_norm(320, **kw)
        self.ff = unet.FeedForward(320, **kw)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.ff(self.norm(x))


class Block(nnx.Module):
    """A transformer block of SD1.5's largest map, with cuDNN's attention; the text is fixed."""

    shape = (8, 4096, 320)

    def __init__(self, **kw: Any):
        self.block = unet.BasicTransformerBlock(320, 768, 8, **kw)

    def __call__(self, x: jax.Array) -> jax.Array:
        text = jnp.broadcast_to(x[:, :77, :1], (x.shape[0], 77, 768))
        return self.block(x, text, kernel())


class Stage(nnx.Module):
    """The first down stage of SD1.5: two resnets with a spatial transformer each."""

    shape = (8, 64, 64, 320)

    def __init__(self, **kw: Any):
        config: Any = types.SimpleNamespace(
            norm_num_groups=32,
            norm_eps=1e-5,
            act_fn="silu",
            use_linear_projection=False,
            downsample_padding=1,
        )
        told: dict[str, Any] = {"attentions": 2, "context": 768, "heads": 8}
        channels = [(320, 320)] * 2
        self.stage = unet.Stage(
            config, channels, 1280, **told, transformer_layers=1, downsample=True, **kw
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        time = jnp.broadcast_to(x[:, 0, 0, :1], (x.shape[0], 1280))
        text = jnp.broadcast_to(x[:, 0, :1, :1], (x.shape[0], 77, 768))
        return self.stage.down(x, time, text, [], execution.Execution(kernel()))


class Blocks(nnx.Module):
    """Ten transformer blocks of SDXL's smallest map, recomputed in the backward."""

    shape = (8, 1024, 1280)
    scan = False

    def __init__(self, **kw: Any):
        made = [unet.BasicTransformerBlock(1280, 2048, 20, **kw) for _ in range(10)]
        self.blocks = nnx.List(made)

    def __call__(self, x: jax.Array) -> jax.Array:
        text = jnp.broadcast_to(x[:, :77, :1], (x.shape[0], 77, 2048))
        how = execution.Execution(kernel(), "transformer", self.scan)
        return execution.apply_blocks(list(self.blocks), x, text, how)


class Loop(Blocks):
    scan = True


PARTS: dict[str, Any] = {
    "resnet": Resnet,
    "feed-forward": FeedForward,
    "block": Block,
    "stage": Stage,
    "blocks": Blocks,
    "blocks in a loop": Loop,
}


def measure(name: str, topology: str) -> dict[str, Any]:
    """Compiles a part's step; returns its memory and traffic in bytes."""
    devices = topologies.open_devices(topology)
    mesh = meshes.make_mesh(data=1, fsdp=1, devices=devices[:1])
    model = parameters.abstract(lambda _, **kw: PARTS[name](**kw), {}, dtype=jnp.bfloat16)
    structure, params = parameters.split(model)
    tx = optim.make_optimizer(1e-4)
    forward = over_rows(lambda params, x: parameters.merge(structure, params)(x), mesh)

    def loss(params, frozen, x):
        reference, x = jax.lax.optimization_barrier((forward(frozen, x), x))
        ours, theirs = (y.astype(jnp.float32) for y in (forward(params, x), reference))
        return (jnp.square(ours) - jnp.square(jax.lax.stop_gradient(theirs))).mean()

    def update(params, opt_state, frozen, x):
        value, grads = jax.value_and_grad(loss)(params, frozen, x)
        finite = jnp.isfinite(value) & jnp.isfinite(optax.tree.norm(grads))
        updates, moved = tx.update(grads, opt_state, params)
        new = optax.apply_updates(params, updates), moved
        kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, (params, opt_state))
        norm = optax.tree.norm(jax.tree.map(jnp.subtract, kept[0], params))
        return *kept, (value, norm)

    state = jax.eval_shape(lambda p: (p, tx.init(p)), params)
    frozen = {
        path: jax.ShapeDtypeStruct(x.shape, parameters.frozen_dtype(path, jnp.bfloat16))
        for path, x in params.items()
    }
    formats = layouts.parameter_formats(mesh, (*state, frozen))
    given = jax.tree.map(
        lambda x, held: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=held),
        (*state, frozen),
        formats,
    )
    x = jax.ShapeDtypeStruct(PARTS[name].shape, jnp.bfloat16, sharding=meshes.batch_sharding(mesh))
    jitted = jax.jit(
        update,
        donate_argnums=(0, 1),
        out_shardings=(*formats[:2], meshes.replicated(mesh)),
        compiler_options=step.COMPILER_OPTIONS,
    )
    with jax.set_mesh(mesh), topologies.tracing_for(topology):
        program = jitted.lower(*given, x).compile()
    memory = report.measure_memory(program)
    text = hlo.Program(program.as_text() or "")
    traffic, _ = hlo.memory_traffic(text)
    found = {"traffic": traffic, "kernels": hlo.kernels(text)}
    found |= {"temporaries": memory.temporaries, "arguments": memory.arguments}
    seconds = (program.cost_analysis() or {}).get("optimal_seconds")  # TPUs alone have it
    return {**found, "seconds": seconds if seconds and seconds > 0 else None}


def table(results: list[dict[str, Any]]) -> str:
    head = ("part", "topology", "label", "traffic GB", "temporaries GB", "kernels", "XLA's ms")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for one in results:
        gigabytes = [f"{one[key] / 1e9:.2f}" for key in ("traffic", "temporaries")]
        seconds = one.get("seconds")
        cells = [one["part"], one["topology"], one["label"], *gigabytes]
        cells.append(str(one.get("kernels", "?")))
        cells.append(f"{1e3 * seconds:.2f}" if seconds else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; default all")
    parser.add_argument("--topology", default="h100:1", help="or a TPU slice, of which one chip")
    parser.add_argument("--label", default="now", help="tells measurements apart")
    parser.add_argument("--table", action="store_true", help="measure nothing, print what was")
    given = parser.parse_args()
    if unknown := sorted(set(given.parts) - set(PARTS)):
        parser.error(f"there are no parts {unknown}; there are {', '.join(PARTS)}")
    jax.config.update("jax_platforms", "cpu")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    for part in () if given.table else given.parts or PARTS:
        about = {"part": part, "topology": given.topology, "label": given.label}
        new = {**about, **measure(part, given.topology)}
        results = [one for one in results if {key: one[key] for key in about} != about] + [new]
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
