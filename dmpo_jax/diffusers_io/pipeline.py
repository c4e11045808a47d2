"""A whole pipeline folder: recognise it, load its parts, write it back with another UNet."""

import logging
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dmpo_jax.diffusers_io import weights
from dmpo_jax.models.families import FAMILIES, Family
from dmpo_jax.noising import NoiseSchedule, make_noise_schedule

SCHEDULE_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "prediction_type",
    "rescale_betas_zero_snr",
    "trained_betas",
)
# CosXL scales the image that it edits, and has a noise schedule of its own; a refiner is
# told a score in place of the target size.
OTHER_CONDITIONING = ("is_cosxl_edit", "requires_aesthetics_score")
SAMPLING_KEYS = (
    "timestep_spacing",
    "steps_offset",
    "set_alpha_to_one",
    "clip_sample",
    "clip_sample_range",
)
# DDIMScheduler's own defaults, which a config.json may leave out; ours are Stable Diffusion's.
SAMPLING_DEFAULTS = {
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "set_alpha_to_one": True,
    "clip_sample": False,
    "clip_sample_range": 1.0,
}


class Pipeline(NamedTuple):
    """What conditions a UNet and decodes its latents; the UNet itself is loaded apart.

    sampling: keyword arguments of `samplers.ddim` that scheduler_config.json states.
    """

    folder: epath.Path
    family: Family
    vae: Any
    text_encoders: tuple[Any, ...]
    tokenizers: tuple[Any, ...]
    schedule: NoiseSchedule
    sampling: dict[str, Any]


def load_family(folder: epath.PathLike) -> tuple[epath.Path, Family]:
    """The folder and its family, by model_index.json.

    Raises:
        ValueError: the folder or its index is missing; the pipeline class is not supported, or
            its index asks for another conditioning than the class's usual one.
    """
    path = weights.find_folder(folder)
    index = weights.read_json(path / "model_index.json")
    kind = index.get("_class_name")
    if kind not in FAMILIES:
        raise ValueError(f"{path} is a {kind}; supported pipelines: {sorted(FAMILIES)}")
    for key in OTHER_CONDITIONING:
        if index.get(key):
            raise ValueError(
                f"{path / 'model_index.json'} has {key}={index[key]}; supported: false"
            )
    return path, FAMILIES[kind]


def load_schedule(folder: epath.PathLike) -> tuple[NoiseSchedule, dict[str, Any]]:
    """The noise schedule and DDIM's settings of a pipeline's scheduler_config.json."""
    config = weights.read_json(weights.find_folder(folder) / "scheduler" / "scheduler_config.json")
    given = {key: config[key] for key in SCHEDULE_KEYS if key in config}
    if config.get("thresholding"):
        raise ValueError("scheduler_config.json asks for thresholding=True; supported: False")
    sampling = {key: config.get(key, SAMPLING_DEFAULTS[key]) for key in SAMPLING_KEYS}
    return make_noise_schedule(**given), sampling


def load_pipeline(
    folder: epath.PathLike, *, vae: str = "", variant: str | None = None, dtype: Any = jnp.float32
) -> Pipeline:
    """Everything of a pipeline folder but its UNet.

    Args:
        folder: a diffusers pipeline folder or hub id.
        vae: another VAE's folder, in place of the pipeline's own (SDXL's fp16-fix, say).
        dtype: compute dtype; parameters are held in float32.

    Raises:
        ValueError: naming the part that is missing or unsupported.
    """
    from transformers import CLIPTokenizer

    path, family = load_family(folder)
    schedule, sampling = load_schedule(path)
    encoders, tokenizers = [], []
    for part in family.text_parts:
        name = part.replace("text_encoder", "tokenizer")
        if not (path / name / "tokenizer_config.json").exists():
            raise ValueError(f"{path} lacks its {name!r} part (tokenizer_config.json)")
        tokenizers.append(CLIPTokenizer.from_pretrained(str(path / name)))
        encoders.append(
            weights.load_text_encoder(path, subfolder=part, variant=variant, dtype=dtype)
        )
    return Pipeline(
        path,
        family,
        weights.load_vae(vae or path, variant=variant, dtype=dtype),
        tuple(encoders),
        tuple(tokenizers),
        schedule,
        sampling,
    )


def embed_prompts(
    pipeline: Pipeline, prompts: Sequence[str], *, batch_size: int = 64
) -> Iterable[tuple[np.ndarray, np.ndarray | None]]:
    """(context [S, D], pooled [P] or None) of each prompt, in order, float32.

    Prompts longer than the tokenizer takes are cut, and their number is logged.
    """
    run = jax.jit(
        lambda ids: pipeline.family.embed(
            [encoder(i) for encoder, i in zip(pipeline.text_encoders, ids, strict=True)]
        )
    )
    cut = 0
    for start in range(0, len(prompts), batch_size):
        batch = list(prompts[start : start + batch_size])
        padded = batch + [""] * (batch_size - len(batch))  # one shape, one compilation
        ids = []
        for tokenizer in pipeline.tokenizers:
            limit = tokenizer.model_max_length
            ids.append(
                tokenizer(padded, padding="max_length", max_length=limit, truncation=True)[
                    "input_ids"
                ]
            )
        limit = pipeline.tokenizers[0].model_max_length
        cut += sum(len(pipeline.tokenizers[0](p)["input_ids"]) > limit for p in batch)
        context, pooled = run([jnp.asarray(i, jnp.int32) for i in ids])
        context = np.asarray(context, np.float32)
        pooled = None if pooled is None else np.asarray(pooled, np.float32)
        for row in range(len(batch)):
            yield context[row], None if pooled is None else pooled[row]
    if cut:
        logging.warning(
            "%d of %d prompts are longer than the tokenizer takes and were cut", cut, len(prompts)
        )


def save_pipeline(unet: Any, source: epath.PathLike, out: epath.PathLike, **kw: Any) -> None:
    """The source pipeline with `unet` in place of its own; other parts are copied as they are.

    model_index.json is the commit marker: taken away first, written last. `kw`: dtype
    and shard_bytes of `save_unet`.
    """
    source, out = weights.find_folder(source), epath.Path(out)
    index = weights.read_json(source / "model_index.json")
    out.mkdir(parents=True, exist_ok=True)
    (out / "model_index.json").unlink(missing_ok=True)
    for part in source.iterdir() if out.resolve() != source.resolve() else ():
        if part.name != "unet" and part.is_dir():
            _copy_folder(part, out / part.name)
    weights.save_unet(unet, out / "unet", **kw)
    weights.write_json(out / "model_index.json", index)


def _copy_folder(source: epath.Path, out: epath.Path) -> None:
    """`out` becomes a copy of `source`; config.json goes first and comes last."""
    (out / "config.json").unlink(missing_ok=True)
    if out.exists():  # or another pipeline's files would stay, and be loaded before ours
        out.rmtree()
    out.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir(), key=lambda f: (f.name == "config.json", f.name)):
        if file.is_dir():
            _copy_folder(file, out / file.name)
        else:
            file.copy(out / file.name, overwrite=True)


def make_index(kind: str, parts: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """model_index.json of a pipeline class: part -> (library, class)."""
    if kind not in FAMILIES:
        raise ValueError(f"{kind!r} is not supported; supported pipelines: {sorted(FAMILIES)}")
    # PyTorch's inpainting pipeline is not opened without a version above 0.5.1.
    about = {"_class_name": kind, "_diffusers_version": "0.30.0"}
    return {**about, **{k: list(v) for k, v in parts.items()}}
