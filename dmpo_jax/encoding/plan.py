"""Settings and identity of an encode: what must match for a second run to resume the first."""

import dataclasses
import hashlib
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
from etils import epath

from dmpo_jax import diffusers_io, storage
from dmpo_jax.data import sources
from dmpo_jax.data.encoded import prompt_store, records
from dmpo_jax.data.encoded.meta import differences
from dmpo_jax.encoding.given import Given
from dmpo_jax.encoding.parts import PARTS, Work
from dmpo_jax.errors import UserError
from dmpo_jax.families import Family

LOG = logging.getLogger(__name__)
PLAN = "plan.json"
CHOICES = {
    "moments": ("sample", "mean"),
    "moments_dtype": prompt_store.DTYPES,
    "crop": ("center", "random"),
    "ties": ("keep", "drop"),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of an encode.

    source: raw pairs, KIND:PATH. model: the pipeline folder with the VAE and text encoders.
        prompts: folder of embeddings (`given`) in place of the text encoders', or "".
        vae: folder of a VAE used in its place, or "". variant: of the weight files.
    dtype: for computation.
    resolution: side of the images in pixels, resized on the shorter side and cropped; None is
        the size that the model was trained at.
    validation_fraction: of the prompts, chosen by a hash of their text, with all their pairs. At
        least one prompt is held out if it is above 0 and there are two prompts or more.
    moments: "sample" stores mean and log-variance, from which latents are drawn. "mean" stores
        the mean alone: half the bytes, and latents without that noise.
    moments_dtype: "bfloat16", "float16" or "float32", as stored.
    flip: also stores each pair mirrored left to right: images, source and mask together.
    crop: "center", or "random", at a place drawn from the pair's id.
    ties: "keep" or "drop" the pairs without a preferred image.
    max_bad: share of bad records above which encoding fails.
    allow_outside: also read images outside the folder of the table that names them.
    batch_size: pairs at a time in each process, rounded up to a multiple of its devices.
    num_threads: threads that decode images ahead of the devices.
    pairs_per_shard: approximate pairs a file, and the most that a kill loses.

    Raises:
        ValueError: a setting is not one of CHOICES.
    """

    source: str
    model: str
    vae: str
    variant: str | None
    dtype: Any
    resolution: int | None
    validation_fraction: float | int
    moments: str
    moments_dtype: str
    flip: bool
    crop: str
    ties: str
    max_bad: float | int
    allow_outside: bool
    batch_size: int
    num_threads: int
    prompts: str = ""
    pairs_per_shard: int = 1024

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                choices = ", ".join(map(repr, allowed))
                raise UserError(f"{name} should be one of {choices}, but got {value!r}")


def describe(
    settings: Settings, pipeline: diffusers_io.Pipeline, given: Given | None = None
) -> dict[str, Any]:
    """Returns the provenance of the pairs, as encoded.json records it.

    given: embeddings in place of the text encoders'.

    Raises:
        ValueError: the model does not accept this VAE's latents, or the resolution.
    """
    family, vae = pipeline.family, pipeline.vae.config
    model = diffusers_io.read_json(pipeline.folder / family.component / "config.json")
    family.check_model(model, vae.latent_channels)
    side = settings.resolution or min(family.trained_latents(model, vae)) * family.factor(vae)
    family.check_size((side, side), family.facts(model), vae)
    content = diffusers_io.digest_encoders(
        pipeline.folder, vae=settings.vae, variant=settings.variant, text=given is None
    )
    scaling, shift = (list(x) if isinstance(x, tuple) else x for x in family.factors(pipeline.vae))
    return {
        "model": str(settings.model),
        "vae": settings.vae,
        "content": content,
        "source": settings.source,
        "resolution": side,
        "validation_fraction": settings.validation_fraction,
        "scaling_factor": scaling,
        "shift_factor": shift,
        "image_kind": family.given_kind,
        "pack": family.pack,
        "told_sizes": family.told_sizes,
        "moments": settings.moments,
        "moments_dtype": settings.moments_dtype,
        "crop": settings.crop,
        "ties": settings.ties,
        **({"prompts_content": given.digest} if given else {}),
    }


def make_plan(work: Work, settings: Settings) -> dict[str, Any]:
    """Returns the settings that must match for a run to resume with the parts of another."""
    units = [list(map(tuple, part.units)) for part in work.parts]
    names = [[unit.name for unit in part.units] for part in work.parts]
    return {
        **work.about,
        "flipped": work.flip,
        "compute_dtype": jnp.dtype(settings.dtype).name,
        "pairs_per_shard": settings.pairs_per_shard,
        "parts": len(work.parts),
        "source_units": hashlib.sha256(repr(units).encode()).hexdigest(),
        # Absent from earlier plans:
        "source_names": storage.hash_json(names),
        "allow_outside": settings.allow_outside or None,
    }


def begin(out: epath.Path, plan: Mapping[str, Any]) -> None:
    """Prepares `out` for a new encode, or to resume an unfinished one of the same plan.

    Raises:
        ValueError: `out` holds complete pairs, or an unfinished encode of another plan.
    """
    found = storage.find_json(out / PARTS / PLAN)
    if found is None:
        records.clear(out)
        if (out / PARTS).exists():
            (out / PARTS).rmtree()
        (out / PARTS).mkdir()
        storage.write_json(out / PARTS / PLAN, dict(plan))
    elif said := _differences(found, _unmoved(found, plan)):
        raise UserError(
            f"{out} holds an unfinished encoding of another kind ({said}): delete it or choose "
            "another folder"
        )
    else:
        LOG.info("resuming the encoding in %s", out)
        (out / records.MARKER).unlink(missing_ok=True)


def sample_files(units: Iterable[sources.Unit]) -> dict[str, str]:
    """Returns {file of the source: sampled hash}."""
    files = dict.fromkeys(unit.file for unit in units)
    return {file: storage.sample_file(file) for file in files if epath.Path(file).is_file()}


def is_done(out: epath.Path, about: Mapping[str, Any]) -> bool:
    """True if `out` holds this encoding, complete; raises ValueError if it holds another.

    A source that changed since makes another encoding. One that is gone, or that merely moved,
    does not.
    """
    if not (out / records.MARKER).exists():
        return False
    try:
        meta = records.load_meta(out)
    except records.IncompleteError:
        return False
    have = meta.to_json()
    if meta.source == about["source"]:
        there = [file for file in meta.source_files if epath.Path(file).is_file()]
        have["source_files"] = {file: meta.source_files[file] for file in there}
        now = {file: storage.sample_file(file) for file in there}
    else:
        now = sample_files(sources.open_source(about["source"], ties=about["ties"]).units())
    if said := _differences(have, _unmoved(have, {**about, "source_files": now})):
        raise UserError(
            f"{out} holds another encoding ({said}): delete it, or choose another folder"
        )
    return True


def _unmoved(have: Mapping[str, Any], want: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `want`, without its source if that is the source of `have` at another place.

    It is if files of the same names have the same content, and are cut into the same units.
    """
    want = dict(want)
    if "source_names" not in have:  # encoded.json has none, nor have earlier plans
        want.pop("source_names", None)
    theirs, ours = map(_contents, (have, want))
    same_units = have.get("source_names") == want.get("source_names")
    if theirs[1] and theirs == ours and same_units:
        want = {k: v for k, v in want.items() if k not in ("source", "source_files")}
        if "source_names" in have:
            want.pop("source_units", None)
    return want


def _contents(about: Mapping[str, Any]) -> tuple[str, list[tuple[str, str]]]:
    """Returns the kind of the source, and the name and the hash of each of its files."""
    files = about.get("source_files") or {}
    named = sorted((epath.Path(file).name, digest) for file, digest in files.items())
    return str(about.get("source")).partition(":")[0], named


def _differences(have: Mapping[str, Any], want: Mapping[str, Any]) -> str:
    """Describes the differences of `want` from `have`; '' if there are none."""
    found = differences(have, want)
    return ", ".join(f"{k}: {a!r} there, {b!r} asked" for k, (a, b) in found.items())


def check_columns(raw: sources.Source, name: str, family: Family) -> None:
    """Raises ValueError if the source lacks an image that the family requires."""
    if missing := sorted(set(family.given_fields) - raw.given):
        columns = " and ".join(repr(sources.GIVEN[field]) for field in missing)
        raise UserError(
            f"a {family.name} model needs the column {columns} in every pair, but {name} has "
            "none: add it, or take a text-to-image model"
        )
