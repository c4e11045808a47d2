"""Digests of a pipeline's weights: they tell models apart, whatever their folders are called."""

import contextlib
from collections.abc import Collection
from typing import Any

from etils import epath

from dmpo_jax import storage
from dmpo_jax.diffusers_io import components, folders
from dmpo_jax.errors import UserError


def digest_model(folder: epath.PathLike, variant: str | None = None) -> str:
    """Returns the digest of a pipeline's trained component. folder: the pipeline's, or its own."""
    path = folders.find_folder(folder)
    if (path / "model_index.json").exists():
        path = path / components.load_family(path)[1].component
    return digest_part(path, components.DIFFUSERS_STEM, variant)


def digest_encoders(
    folder: epath.PathLike,
    *,
    vae: epath.PathLike = "",
    variant: str | None = None,
    text: bool = True,
) -> dict[str, str]:
    """Returns the digests of the parts that encode pairs: the VAE and the text encoders.

    vae: folder of a VAE used in place of the pipeline's own. text: False leaves out the text
    encoders.
    """
    return {
        name: digest_part(path, stem, variant)
        for name, (path, stem) in _parts(folder, vae).items()
        if text or name == "vae"
    }


def _parts(folder: epath.PathLike, vae: epath.PathLike) -> dict[str, tuple[epath.Path, str]]:
    """Returns {name: (folder, stem of its files)} of the parts that encode pairs."""
    path, family = components.load_family(folder)
    texts = {part.name: (path / part.name, components.TRANSFORMERS_STEM) for part in family.text}
    return {"vae": (folders.component(vae or path, "vae"), components.DIFFUSERS_STEM), **texts}


def digest_part(folder: epath.Path, stem: str, variant: str | None) -> str:
    """Returns a digest of a component: its config.json, and a sample of each file of weights.

    As `storage.sample_file` samples: 4 MB a file, the header of small files in it.
    """
    config: dict[str, Any] = folders.read_json(folder / "config.json")
    files = folders.weight_files(folder, stem, variant)
    # Names with an underscore are of the library that saved it, and of the place.
    about = {key: value for key, value in config.items() if not key.startswith("_")}
    return storage.hash_json([about, [storage.sample_file(file) for file in files]])


def digest_variants(
    folder: epath.PathLike, names: Collection[str], *, vae: str, variant: str | None
) -> dict[str, set[str]]:
    """Returns the digests of the named parts that encode pairs, in every variant that is there.

    Other parts may be missing; names that the pipeline has no part of are left out.
    """
    parts = {name: part for name, part in _parts(folder, vae).items() if name in names}
    found = {name: {digest_part(*part, variant)} for name, part in parts.items()}
    for name, (path, stem) in parts.items():
        for other in {None, "fp16"} - {variant}:
            with contextlib.suppress(UserError):
                found[name].add(digest_part(path, stem, other))
    return found
