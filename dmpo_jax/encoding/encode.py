"""Raw pairs -> encoded pairs: VAE moments of both images, and each distinct prompt once.

The source is cut into parts, and `OUT/parts` says which of them are done:

    plan.json           what is being encoded, with what; another plan is refused
    prompts-NNNNN.json  the distinct prompts of a part
    store-NNNNN.json    of a file of the prompt store that is whole
    pairs-NNNNN.json    of a part whose files are whole, and what was left out of it

Each is written after the files it speaks of, so that a second run goes on from there.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from dmpo_jax import diffusers_io, storage
from dmpo_jax.data import raw as sources
from dmpo_jax.data.encoded import folder as records
from dmpo_jax.data.encoded import prompts as prompt_store
from dmpo_jax.encoding import pairs as encode_pairs
from dmpo_jax.encoding import parts as encode_parts
from dmpo_jax.encoding.parts import PARTS, Work
from dmpo_jax.families import Family
from dmpo_jax.families.family import Facts
from dmpo_jax.parallel import mesh, processes

LOG = logging.getLogger(__name__)
PLAN = "plan.json"
CHOICES = {
    "moments": ("sample", "mean"),
    "moments_dtype": prompt_store.DTYPES,
    "crop": ("center", "random"),
    "ties": ("keep", "drop"),
}


def encode(
    *,
    source: str,
    model: str,
    out: epath.PathLike,
    vae: str = "",
    variant: str | None = None,
    resolution: int | None = None,
    validation_fraction: float | int = 0.01,
    batch_size: int = 32,
    dtype: Any = jnp.float32,
    moments: str = "sample",
    moments_dtype: str = "bfloat16",
    flip: bool = False,
    crop: str = "center",
    ties: str = "keep",
    max_bad: float | int = 0.01,
    num_threads: int = 16,
    pairs_per_shard: int = 1024,
) -> None:
    """Encodes every pair of `source` (KIND:PATH) with the VAE and text encoders of `model`.

    With an editing or inpainting model also the image, and the mask, given with each pair.
    Does nothing where `out` already holds the same encoding, whole; goes on where a run with
    the same arguments stopped, to the same files byte for byte. With several processes
    (jax.distributed) each encodes its share on its own devices, and `out` is a folder that
    all of them see; the files do not depend on how many there are.

    Args:
        resolution: side of the images in pixels, resized on the shorter side and cropped;
            None is the size that the UNet was trained at.
        validation_fraction: of the prompts, chosen by a hash of their text, with all their
            pairs; where it is above 0 and there are two prompts or more, at least one.
        batch_size: pairs encoded at a time by each process, rounded up to a multiple of its
            devices.
        dtype: to compute in.
        moments: "sample" keeps what latents are drawn from, mean and log-variance; "mean"
            the mean alone, half as many bytes, for latents without that noise.
        moments_dtype: "bfloat16", "float16" or "float32", as they are stored.
        flip: also stores each pair mirrored left to right: images, source and mask together.
        crop: "center", or "random", at a place drawn from the pair's id.
        ties: "keep" pairs that nobody prefers, or "drop" them.
        max_bad: share of bad records above which the job gives up.
        num_threads: decode images ahead of the devices.
        pairs_per_shard: about so many pairs share a file, and are lost to a kill at most.

    Raises:
        ValueError: `out` holds another encoding, or an unfinished one; too many records are
            bad; a part of the model is missing or does not fit the others; or the source
            lacks a column with what the model is given.
    """
    out = epath.Path(out)
    check_choices(moments=moments, moments_dtype=moments_dtype, crop=crop, ties=ties)
    pipeline = diffusers_io.load_pipeline(model, vae=vae, variant=variant, dtype=dtype)
    config = diffusers_io.read_json(pipeline.folder / "unet" / "config.json")
    facts = pipeline.family.facts(config)
    pipeline.family.check_channels(facts.in_channels, pipeline.vae.config.latent_channels)
    about = {
        "model": str(model),
        "vae": vae,
        "source": source,
        "resolution": resolution or trained_side(facts, pipeline.vae.config),
        "validation_fraction": validation_fraction,
        "scaling_factor": pipeline.vae.config.scaling_factor,
        "shift_factor": pipeline.vae.config.shift_factor or 0.0,
        "image_kind": pipeline.family.given_kind,
        "moments": moments,
        "moments_dtype": moments_dtype,
        "crop": crop,
        "ties": ties,
    }
    if is_done(out, {**about, "flipped": flip}):
        LOG.info("%s is encoded already", out)
        return
    raw = sources.open_source(source, ties=ties)
    check_columns(raw, source, pipeline.family)
    devices = mesh.make_mesh(devices=jax.local_devices())
    work = Work(
        out=out,
        source=raw,
        parts=encode_parts.make_parts(raw.units(), pairs_per_shard),
        pipeline=pipeline,
        devices=devices,
        about=about,
        flip=flip,
        batch_size=-(-batch_size // devices.size) * devices.size,
        num_threads=num_threads,
        max_bad=max_bad,
    )
    plan = make_plan(work, jnp.dtype(dtype).name, pairs_per_shard)
    run(work, plan, jax.process_index(), jax.process_count(), wait_for_all)


def run(
    work: Work, plan: Mapping[str, Any], index: int, count: int, wait: Callable[[str], None]
) -> None:
    """What process `index` of `count` does; `wait` returns when all have come to its name."""
    if index == 0:
        begin(work.out, plan)
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


def begin(out: epath.Path, plan: Mapping[str, Any]) -> None:
    """Makes `out` ready: empty of encodings but for an unfinished one of the same plan.

    Raises:
        ValueError: an unfinished encoding of another plan is there.
    """
    found = storage.find_json(out / PARTS / PLAN)
    if found is None:
        records.clear(out)
        if (out / PARTS).exists():
            (out / PARTS).rmtree()
        (out / PARTS).mkdir()
        storage.write_json(out / PARTS / PLAN, dict(plan))
    elif said := _differences(found, plan):
        raise ValueError(
            f"{out} holds an unfinished encoding of another kind ({said}): delete it or choose "
            "another folder"
        )
    else:
        LOG.info("going on with the encoding in %s", out)
        (out / records.MARKER).unlink(missing_ok=True)


def make_plan(work: Work, dtype: str, pairs_per_shard: int) -> dict[str, Any]:
    """What must be the same for a run to go on with another's parts."""
    units = hashlib.sha256(repr([list(map(tuple, part.units)) for part in work.parts]).encode())
    return {
        **work.about,
        "flipped": work.flip,
        "compute_dtype": dtype,
        "pairs_per_shard": pairs_per_shard,
        "parts": len(work.parts),
        "source_units": units.hexdigest(),
    }


def check_choices(**asked: str) -> None:
    """ValueError at a setting that is not one of CHOICES."""
    for name, value in asked.items():
        if value not in CHOICES[name]:
            allowed = ", ".join(map(repr, CHOICES[name]))
            raise ValueError(f"{name} should be one of {allowed}, but got {value!r}")


def trained_side(facts: Facts, vae: Any) -> int:
    """The images' side in pixels that a model was trained at, by the two configs."""
    factor = 2 ** (len(vae.block_out_channels) - 1)
    return min(facts.latent_size) * factor if facts.latent_size else vae.sample_size


def is_done(out: epath.Path, about: Mapping[str, Any]) -> bool:
    """Whether `out` holds this encoding, whole; ValueError where it holds another."""
    if not (out / records.MARKER).exists():
        return False
    try:
        meta = records.load_meta(out)
    except records.NotWholeError:
        return False
    # What encodings were before they could be told otherwise.
    dtype = meta["shapes"]["moments"]["dtype"]
    if said := _differences(
        {"crop": "center", "ties": "keep", "moments_dtype": dtype} | meta, about
    ):
        raise ValueError(f"{out} holds another encoding ({said}): choose another folder")
    return True


def _differences(have: Mapping[str, Any], want: Mapping[str, Any]) -> str:
    """In words, where `want` differs from `have`; '' where it does not."""
    return ", ".join(
        f"{k}: {have.get(k)!r} there, {v!r} asked" for k, v in want.items() if have.get(k) != v
    )


def check_columns(raw: sources.Source, name: str, family: Family) -> None:
    """ValueError where the source has not what the family is given beside the latents."""
    if missing := sorted(set(family.given_fields) - raw.given):
        columns = " and ".join(repr(sources.GIVEN[field]) for field in missing)
        raise ValueError(
            f"a {family.name} model needs the column {columns} in every pair, but {name} has "
            "none: add it, or take a text-to-image model"
        )
