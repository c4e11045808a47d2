"""Class and file names of each component of a pipeline folder."""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from dmpo_jax.diffusers_io import folders
from dmpo_jax.diffusers_io.weights import load_weights, save_weights
from dmpo_jax.errors import UserError
from dmpo_jax.families import FAMILIES, Family
from dmpo_jax.families.family import unguided, without
from dmpo_jax.models.clip import CLIPTextModel
from dmpo_jax.models.qwen3 import Qwen3Model
from dmpo_jax.models.t5 import T5EncoderModel
from dmpo_jax.models.unet import UNet2DConditionModel
from dmpo_jax.models.vae import AutoencoderKL

LOG = logging.getLogger(__name__)
DIFFUSERS_STEM, TRANSFORMERS_STEM = "diffusion_pytorch_model", "model"
# Text encoders, keyed by the first of `architectures` in config.json.
TEXT_MODELS: dict[str, Callable[..., Any]] = {
    "CLIPTextModel": CLIPTextModel,
    "CLIPTextModelWithProjection": functools.partial(CLIPTextModel, projection=True),
    "T5EncoderModel": T5EncoderModel,
    "Qwen3ForCausalLM": Qwen3Model,
    "Qwen3Model": Qwen3Model,
}
# CosXL scales its input image and has its own noise schedule. A refiner takes an aesthetic
# score in place of the target size.
OTHER_CONDITIONING = ("is_cosxl_edit", "requires_aesthetics_score")


def load_family(folder: epath.PathLike) -> tuple[epath.Path, Family]:
    """Returns the folder and its family, from model_index.json, less optional parts it lacks.

    Raises:
        ValueError: the folder or its index is missing; the pipeline class is not supported, or
            its index asks for another conditioning than the class's usual one.
    """
    path = folders.find_folder(folder)
    index = folders.read_json(path / "model_index.json")
    kind = str(index.get("_class_name"))
    if kind not in FAMILIES:
        raise UserError(f"{path} is a {kind}; supported pipelines: {sorted(FAMILIES)}")
    for key in OTHER_CONDITIONING:
        if index.get(key):
            raise UserError(f"{path / 'model_index.json'} has {key}={index[key]}; supported: false")
    family = FAMILIES[kind]
    if index.get("is_distilled"):
        _warn_of_distillation(str(path))
        family = unguided(family)
    optional = [part.name for part in family.text if part.optional]
    return path, without(family, frozenset(name for name in optional if _is_null(index, name)))


@functools.cache  # once a folder
def _warn_of_distillation(folder: str) -> None:
    LOG.warning(
        "%s is distilled to few steps (is_distilled): training undoes that gradually, and "
        "images are drawn without guidance. Better train the model that was not distilled",
        folder,
    )


def _is_null(index: Mapping[str, Any], part: str) -> bool:
    """True if model_index.json says that the pipeline has no such part."""
    library, *_ = index.get(part) or (None,)
    return library is None


def load_model(folder: epath.PathLike, **kw: Any) -> Any:
    """Loads the trained component from a pipeline folder or from its own folder.

    A pipeline folder determines the class by its family, a component's folder by its
    config.json. `kw`: those of `load_weights`.

    Raises:
        ValueError: besides those of `load_weights`, no registered family has such a model.
    """
    path = folders.find_folder(folder)
    if (path / "model_index.json").exists():
        path, family = load_family(path)
        path = folders.component(path, family.component)
        return load_weights(family.model, path, stem=DIFFUSERS_STEM, **kw)
    config = folders.read_json(path / "config.json")
    models = {family.model.__name__: family.model for family in FAMILIES.values()}
    make = _named(path, config.get("_class_name"), models, "models")
    return load_weights(make, path, stem=DIFFUSERS_STEM, **kw)


def load_unet(folder: epath.PathLike, **kw: Any) -> UNet2DConditionModel:
    """Loads the UNet of a pipeline folder, or of its unet/ folder. `kw`: as `load_weights`."""
    path = folders.component(folder, "unet")
    return load_weights(UNet2DConditionModel, path, stem=DIFFUSERS_STEM, **kw)


def load_vae(folder: epath.PathLike, **kw: Any) -> Any:
    """Loads the VAE of a pipeline folder, or of its vae/ folder, by the class in its config.json.

    `kw`: those of `load_weights`.
    """
    path = folders.component(folder, "vae")
    name = folders.read_json(path / "config.json").get("_class_name") or "AutoencoderKL"
    classes = {family.vae.__name__: family.vae for family in FAMILIES.values()}
    make = _named(path, name, {"AutoencoderKL": AutoencoderKL, **classes}, "VAEs")
    return load_weights(make, path, stem=DIFFUSERS_STEM, **kw)


def load_text_encoder(
    folder: epath.PathLike,
    *,
    subfolder: str = "text_encoder",
    layers: int | None = None,
    **kw: Any,
) -> Any:
    """Loads a text encoder from `subfolder` of a pipeline folder, or from its own folder.

    Args:
        layers: number of layers to load of a deep encoder; None loads all.
        kw: those of `load_weights`.
    """
    path = folders.component(folder, subfolder)
    make = text_model(path, folders.read_json(path / "config.json"))
    if layers is not None:
        make = functools.partial(make, layers=layers)
    return load_weights(make, path, stem=TRANSFORMERS_STEM, **kw)


def text_model(path: epath.Path, config: Mapping[str, Any]) -> Callable[..., Any]:
    """Returns the class that a text encoder's config.json names; ValueError if unsupported."""
    kind = config.get("architectures") or ["CLIPTextModel"]
    kind = kind[0] if isinstance(kind, list) else kind
    return _named(path, kind, TEXT_MODELS, "text encoders")


def _named(path: epath.Path, name: Any, known: Mapping[str, Any], what: str) -> Callable[..., Any]:
    if not isinstance(name, str) or name not in known:
        raise UserError(f"{path} holds a {name}; supported {what}: {sorted(known)}")
    return known[name]


def save_model(model: Any, folder: epath.PathLike, **kw: Any) -> None:
    """Writes a trained component in diffusers' format; `folder` is the component's own.

    `kw`: params, dtype and shard_bytes of `save_weights`.
    """
    save_weights(model, folder, stem=DIFFUSERS_STEM, **kw)


def save_unet(unet: UNet2DConditionModel, folder: epath.PathLike, **kw: Any) -> None:
    """Writes the UNet in diffusers' format; arguments as `save_model`."""
    save_model(unet, folder, **kw)


def save_vae(vae: Any, folder: epath.PathLike, **kw: Any) -> None:
    """Writes the VAE in diffusers' format; arguments as `save_model`."""
    save_weights(vae, folder, stem=DIFFUSERS_STEM, **kw)


def save_text_encoder(text: Any, folder: epath.PathLike, **kw: Any) -> None:
    """Writes a text encoder in transformers' format; arguments as `save_model`."""
    save_weights(text, folder, stem=TRANSFORMERS_STEM, **kw)
