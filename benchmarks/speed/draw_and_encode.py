"""Cost of an image drawn and of a pair encoded, from XLA's compilers. Needs no chip.

    python benchmarks/speed/draw_and_encode.py                        # every row, minutes each
    python benchmarks/speed/draw_and_encode.py sdxl-draw --topology=v5e:2x2
    python benchmarks/speed/draw_and_encode.py --table                # earlier results, as a table

Requires the extra [plan-gpu], or [plan] for a TPU, of which one chip is used. The programs are
those of `sample` and `encode`, in bfloat16, with the model's published shapes: a batch of 4
images through every step with guidance and the VAE's decoder, and a batch of 4 pairs through its
encoder. Text encoders are not included. Results go to results/draw_and_encode.json.
"""

import argparse
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from dmpo_jax import diffusers_io
from dmpo_jax.data.encoded.meta import EncodedMeta
from dmpo_jax.diffusers_io.schedules import Sampling
from dmpo_jax.diffusion import samplers
from dmpo_jax.encoding import vae as encoder
from dmpo_jax.families import PUBLISHED
from dmpo_jax.models import parameters
from dmpo_jax.models.execution import AUTO, Execution
from dmpo_jax.parallel import meshes
from dmpo_jax.planning import chips, flops, hlo, report, step, topologies
from dmpo_jax.sampling import sampler

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "draw_and_encode.json"
BATCH, STEPS, GUIDANCE = 4, 30, 5.0
VAE = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32}
ROWS = [f"{model}-{job}" for model in ("sd15", "sdxl", "sd35_medium") for job in ("draw", "encode")]


def trace(name: str, mesh: jax.sharding.Mesh, attention: str) -> Any:
    """Traces a row's program for one device."""
    model, _, job = name.rpartition("-")
    published = PUBLISHED[model]
    family, planned = published.family, step.of_published(published, model)
    meta = planned.meta
    vae = parameters.abstract(
        family.vae,
        {
            **VAE,
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "latent_channels": published.latent_channels,
            "scaling_factor": published.scaling_factor,
            "shift_factor": published.shift_factor,
            **({"use_quant_conv": False, "use_post_quant_conv": False} if "sd3" in model else {}),
        },
        dtype=jnp.bfloat16,
    )
    sampling = Sampling(epath.Path(), {}, noise=family.noise)
    pipeline = diffusers_io.Pipeline(epath.Path(), family, vae, (), (), planned.noise, sampling)
    whole, rows = meshes.replicated(mesh), meshes.batch_sharding(mesh)

    vae_params = {
        path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)
        for path, x in parameters.split(vae)[1].items()
    }
    if job == "encode":
        side = meta.latents[0] * published.factor
        pixels = jax.ShapeDtypeStruct((BATCH, 2, side, side, 3), jnp.uint8, sharding=rows)
        return encoder.make_run(pipeline).trace(vae_params, pixels, None, None)
    return draw(pipeline, model, meta, vae_params, mesh, attention)


def draw(
    pipeline: diffusers_io.Pipeline,
    name: str,
    meta: EncodedMeta,
    vae_params: Any,
    mesh: jax.sharding.Mesh,
    attention: str,
) -> Any:
    """Traces a batch of images, with the solver that stands for the family."""
    family = pipeline.family
    whole, rows = meshes.replicated(mesh), meshes.batch_sharding(mesh)
    model = parameters.abstract(family.model, dict(PUBLISHED[name].model), dtype=jnp.bfloat16)
    model.execution = Execution(attention).on(mesh)
    params = {
        path: jax.ShapeDtypeStruct(
            x.shape, parameters.frozen_dtype(path, jnp.bfloat16), sharding=whole
        )
        for path, x in parameters.split(model)[1].items()
    }
    solver = "flow_euler" if family.noise == "flow" else "ddim"
    settings = pipeline.sampling.settings(solver)

    def solve(guided: Any, noise: jax.Array) -> jax.Array:
        return samplers.SAMPLERS[solver](
            guided, noise, schedule=pipeline.schedule, num_steps=STEPS, **settings
        )

    run = sampler.make_run(
        pipeline,
        model,
        meta.latents,
        solve,
        guidance_scale=GUIDANCE,
        image_scale=None,
        devices=mesh,
    )
    told = jax.eval_shape(lambda told: told.per_image(1), meta.abstract_batch(BATCH).condition)
    told = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), told)
    seeds = jax.ShapeDtypeStruct((BATCH,), jnp.uint32, sharding=rows)
    return run.trace(params, vae_params, told, told, None, None, seeds)


def measure(name: str, topology: str, attention: str) -> dict[str, Any]:
    """Compiles a row; returns FLOPs, bytes and seconds by roofline of one image or one pair."""
    device = topologies.open_devices(topology)[0]
    mesh = meshes.make_mesh(data=1, fsdp=1, devices=[device])
    began = time.monotonic()
    with jax.set_mesh(mesh), topologies.tracing_for(topology):
        traced = trace(name, mesh, attention)
        program = traced.lower().compile()
    memory = report.measure_memory(program)
    traffic, _ = hlo.memory_traffic(hlo.Program(program.as_text() or ""))
    counted = flops.jaxpr_flops(traced.jaxpr)
    found = {"flops": counted / BATCH, "traffic": traffic / BATCH}
    found |= {"temporaries": memory.temporaries, "arguments": memory.arguments}
    modelled = report.model_time(
        chips.lookup(device.device_kind), flops=found["flops"], traffic=found["traffic"], moved=0
    )
    return {
        **found,
        "seconds": modelled and {limit: modelled[limit] for limit in ("compute", "memory")},
        "bound_by": report.bound_by(modelled),
        "compile_seconds": round(time.monotonic() - began),
        "jax": jax.__version__,
    }


def table(results: list[dict[str, Any]]) -> str:
    head = ("row", "topology", "attention", "TFLOP", "traffic GB", "s by products", "s by traffic")
    head += ("of a batch: arguments GB", "temporaries GB")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for one in results:
        cells = [one["row"], one["topology"], one["attention"], f"{one['flops'] / 1e12:.2f}"]
        cells += [f"{one['traffic'] / 1e9:.1f}"]
        times = one["seconds"] or {}
        cells += [f"{times[limit]:.3f}" if times else "" for limit in ("compute", "memory")]
        cells += [f"{one[key] / 1e9:.2f}" for key in ("arguments", "temporaries")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", help=f"of {', '.join(ROWS)}; default all")
    parser.add_argument("--topology", default="h100:1", help="or a TPU slice, of which one chip")
    parser.add_argument("--attention", default=AUTO, help="of the model; auto is the platform's")
    parser.add_argument("--table", action="store_true", help="measure nothing, print what was")
    given = parser.parse_args()
    if unknown := sorted(set(given.rows) - set(ROWS)):
        parser.error(f"there are no rows {unknown}; there are {', '.join(ROWS)}")
    jax.config.update("jax_platforms", "cpu")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    for row in () if given.table else given.rows or ROWS:
        about = {"row": row, "topology": given.topology, "attention": given.attention}
        new = {**about, **measure(*about.values())}
        results = [one for one in results if {key: one[key] for key in about} != about] + [new]
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
