"""Raw pairs -> encoded pairs: VAE moments of both images, and each distinct prompt once.

The source is cut into parts, and `OUT/parts` says which of them are done:

    plan.json           what is being encoded, with what; another plan is refused
    prompts-NNNNN.json  the distinct prompts of a part
    store-NNNNN.json    of a file of the prompt store that is whole
    pairs-NNNNN.json    of a part whose files are whole, and what was left out of it

Each is written after the files it speaks of, so that a second run goes on from there.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath

from dmpo_jax import diffusers_io
from dmpo_jax.data import raw as sources
from dmpo_jax.encoding import pairs as encode_pairs
from dmpo_jax.encoding import parts as encode_parts
from dmpo_jax.encoding import plan as plans
from dmpo_jax.encoding.parts import Work
from dmpo_jax.encoding.plan import Settings
from dmpo_jax.parallel import mesh, processes

LOG = logging.getLogger(__name__)


def encode(settings: Settings, pipeline: diffusers_io.Pipeline, out: epath.PathLike) -> None:
    """Encodes every pair of the source with the pipeline's VAE and text encoders.

    With an editing or inpainting model also the image, and the mask, given with each pair.
    Does nothing where `out` already holds the same encoding, complete; resumes where a run with
    the same settings stopped, to the same files byte for byte. With several processes
    (jax.distributed) each encodes its share on its own devices, and `out` is a folder that
    all of them see; the files do not depend on how many there are.

    Args:
        pipeline: loaded from settings.model and .vae.

    Raises:
        ValueError: `out` holds another encoding, or an unfinished one; too many records are
            bad; the VAE does not fit the model; or the source lacks a column with what the
            model is given.
    """
    out = epath.Path(out)
    about = plans.describe(settings, pipeline)
    if plans.is_done(out, {**about, "flipped": settings.flip}):
        LOG.info("%s is encoded already", out)
        return
    source = sources.open_source(settings.source, ties=settings.ties)
    plans.check_columns(source, settings.source, pipeline.family)
    devices = mesh.make_mesh(devices=jax.local_devices())
    work = Work(
        out=out,
        source=source,
        parts=encode_parts.make_parts(source.units(), settings.pairs_per_shard),
        pipeline=pipeline,
        devices=devices,
        about=about,
        flip=settings.flip,
        batch_size=-(-settings.batch_size // devices.size) * devices.size,
        num_threads=settings.num_threads,
        max_bad=settings.max_bad,
    )
    plan = plans.make_plan(work, settings)
    run(work, plan, jax.process_index(), jax.process_count(), wait_for_all)


def run(
    work: Work, plan: Mapping[str, Any], index: int, count: int, wait: Callable[[str], None]
) -> None:
    """This process's share of the encode, `index` of `count`. `wait(name)` is a barrier."""
    if index == 0:
        plans.begin(work.out, plan)
    wait("begun")
    encode_parts.list_prompts(work, index, count)
    wait("listed")
    table = encode_parts.load_table(work)
    encode_parts.write_prompts(work, table, index, count)
    encode_pairs.write_pairs(work, table, index, count)
    wait("written")
    if index == 0:
        encode_pairs.finish(work, table)
    wait("finished")


def wait_for_all(name: str) -> None:
    """Returns when every process has come here."""
    processes.barrier(f"encode {name}")
