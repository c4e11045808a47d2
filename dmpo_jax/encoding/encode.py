"""Encodes raw pairs: VAE moments of both images, and each distinct prompt once.

The source is split into parts, and `OUT/parts` records the progress:

    plan.json           the plan: settings and source; another plan is an error
    prompts-NNNNN.json  the distinct prompts of a part
    store-NNNNN.json    marks a file of the prompt store as complete
    pairs-NNNNN.json    marks the files of a part as complete, and counts its skipped records

Each is written after the files that it describes, so that a second run resumes from there.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath

from dmpo_jax import diffusers_io
from dmpo_jax.data import sources
from dmpo_jax.encoding import pairs as encode_pairs
from dmpo_jax.encoding import parts as encode_parts
from dmpo_jax.encoding import plan as plans
from dmpo_jax.encoding.given import Given, open_given
from dmpo_jax.encoding.parts import Work
from dmpo_jax.encoding.plan import Settings
from dmpo_jax.parallel import meshes, processes

LOG = logging.getLogger(__name__)


def encode(settings: Settings, pipeline: diffusers_io.Pipeline, out: epath.PathLike) -> None:
    """Encodes every pair of the source with the pipeline's VAE and text encoders.

    For an editing or inpainting model, also encodes the image, and the mask, given with each pair.
    Does nothing if `out` already holds the same complete encoding. Resumes an unfinished run of
    the same settings; the output is byte-identical. With several processes (jax.distributed), each
    encodes its share on its own devices, and `out` must be a shared folder. The files do not
    depend on the number of processes.

    Args:
        pipeline: loaded from settings.model and .vae. Text encoders that it lacks are loaded while
            prompts are embedded, sharded over this process's devices, and freed afterwards; none
            with settings.prompts.

    Raises:
        ValueError: `out` holds another encoding, or an unfinished one; too many records are bad;
            the VAE or the given embeddings do not fit the model; or the source lacks a column
            that the model requires.
    """
    out = epath.Path(out)
    with contextlib.ExitStack() as stack:
        given = None
        if settings.prompts:
            given = stack.enter_context(open_given(settings.prompts, pipeline.folder))
        about = plans.describe(settings, pipeline, given)
        if plans.is_done(out, {**about, "flipped": settings.flip}):
            LOG.info("%s is encoded already: delete it to encode anew", out)
            return
        work = make_work(settings, pipeline, given, about, out)
        plan = plans.make_plan(work, settings)
        run(work, plan, jax.process_index(), jax.process_count(), wait_for_all)


def make_work(
    settings: Settings,
    pipeline: diffusers_io.Pipeline,
    given: Given | None,
    about: dict[str, Any],
    out: epath.Path,
) -> Work:
    """Opens the source and cuts it into parts.

    about: for encoded.json; process 0 adds the hashes of the source's files.
    """
    source = sources.open_source(
        settings.source, ties=settings.ties, allow_outside=settings.allow_outside
    )
    plans.check_columns(source, settings.source, pipeline.family)
    local = jax.local_devices()
    devices = meshes.make_mesh(devices=local)
    parts = encode_parts.make_parts(source.units(), settings.pairs_per_shard)
    if jax.process_index() == 0:  # which alone writes the plan and encoded.json
        about["source_files"] = plans.sample_files(unit for part in parts for unit in part.units)
    load_text = functools.partial(
        diffusers_io.with_text,
        pipeline,
        variant=settings.variant,
        dtype=settings.dtype,
        mesh=meshes.make_mesh(devices=local, data=1, fsdp=-1),
    )
    return Work(
        out=out,
        source=source,
        parts=parts,
        pipeline=pipeline,
        load_text=load_text,
        devices=devices,
        about=about,
        flip=settings.flip,
        batch_size=-(-settings.batch_size // devices.size) * devices.size,
        num_threads=settings.num_threads,
        max_bad=settings.max_bad,
        given=given,
    )


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
    """Waits at the barrier `name` until every process has reached it."""
    processes.barrier(f"encode {name}")
