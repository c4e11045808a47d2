"""A whole pipeline folder: recognise it, load its parts, write it back with another UNet."""

import functools
import logging
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dmpo_jax import storage
from dmpo_jax.diffusers_io import weights
from dmpo_jax.diffusers_io.folders import component, find_folder, read_json, some
from dmpo_jax.diffusers_io.schedules import Sampling, load_schedule
from dmpo_jax.diffusion.noise import NoiseSchedule
from dmpo_jax.families import FAMILIES, Family
from dmpo_jax.models import clip, parameters
from dmpo_jax.parallel import processes

# CosXL scales the image that it edits, and has a noise schedule of its own; a refiner is
# told a score in place of the target size.
OTHER_CONDITIONING = ("is_cosxl_edit", "requires_aesthetics_score")


class Pipeline(NamedTuple):
    """What conditions a UNet and decodes its latents; the UNet itself is loaded apart.

    sampling: which sampler scheduler_config.json names, and the settings of each.
    zero_negative: whether no negative prompt means embeddings of zeros (SDXL's
        force_zeros_for_empty_prompt) rather than those of the empty prompt.
    """

    folder: epath.Path
    family: Family
    vae: Any
    text_encoders: tuple[Any, ...]
    tokenizers: tuple[Any, ...]
    schedule: NoiseSchedule
    sampling: Sampling
    zero_negative: bool = False


def load_family(folder: epath.PathLike) -> tuple[epath.Path, Family]:
    """The folder and its family, by model_index.json.

    Raises:
        ValueError: the folder or its index is missing; the pipeline class is not supported, or
            its index asks for another conditioning than the class's usual one.
    """
    path = find_folder(folder)
    index = read_json(path / "model_index.json")
    kind = index.get("_class_name")
    if kind not in FAMILIES:
        raise ValueError(f"{path} is a {kind}; supported pipelines: {sorted(FAMILIES)}")
    for key in OTHER_CONDITIONING:
        if index.get(key):
            raise ValueError(
                f"{path / 'model_index.json'} has {key}={index[key]}; supported: false"
            )
    return path, FAMILIES[kind]


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
    index = read_json(path / "model_index.json")
    schedule, sampling = load_schedule(path)
    check_parts(path, family)
    encoders, tokenizers = [], []
    for part in family.text:
        name = part.tokenizer
        if not (path / name / "tokenizer_config.json").exists():
            raise ValueError(f"{path} lacks its {name!r} part (tokenizer_config.json)")
        tokenizers.append(CLIPTokenizer.from_pretrained(str(path / name)))
        encoders.append(
            weights.load_text_encoder(path, subfolder=part.name, variant=variant, dtype=dtype)
        )
    return Pipeline(
        path,
        family,
        weights.load_vae(vae or path, variant=variant, dtype=dtype),
        tuple(encoders),
        tuple(tokenizers),
        schedule,
        sampling,
        family.zero_negative and bool(index.get("force_zeros_for_empty_prompt", True)),
    )


def check_parts(path: epath.Path, family: Family) -> None:
    """Refuses text encoders that are not the UNet's, by the parts' config.json files alone.

    Raises:
        ValueError: naming the folder whose text encoders have another width than the UNet
            attends to, or of which the UNet needs a projection that is not there.
    """
    if not (path / "unet" / "config.json").exists():
        return  # whoever loads the UNet will say so
    facts = family.facts(read_json(path / "unet" / "config.json"))
    texts = {}
    for part in family.text:
        texts[part.name] = {**clip.KEYS, **read_json(component(path, part.name) / "config.json")}
    widths = [text["hidden_size"] for text in texts.values()]
    attended = facts.context_width
    if sum(widths) != attended:
        raise ValueError(
            f"{path / 'unet'} attends to width {attended} (cross_attention_dim), but "
            f"{some(list(texts))} give {' + '.join(map(str, widths))} (hidden_size): take the "
            "text encoders from the UNet's own pipeline"
        )
    if not facts.pooled_width:
        return
    last, text = list(texts.items())[-1]
    if not weights.TEXT_KINDS[weights.text_kind(path / last, text)]:
        raise ValueError(
            f"{path / last} has no projection, which the UNet (text_time) needs: its config.json "
            f"says {text.get('architectures')}, wanted CLIPTextModelWithProjection"
        )
    pooled = facts.pooled_width
    if pooled != text["projection_dim"]:
        raise ValueError(
            f"{path / 'unet'} takes a pooled embedding of width {pooled}, but {last} projects to "
            f"{text['projection_dim']} (projection_dim): take it from the UNet's own pipeline"
        )


def embed_prompts(
    pipeline: Pipeline, prompts: Sequence[str], *, batch_size: int = 64
) -> Iterable[tuple[np.ndarray, np.ndarray | None]]:
    """(context [S, D], pooled [P] or None) of each prompt, in order, float32.

    Prompts longer than the tokenizer takes are cut, and their number is logged.
    """
    structures, params = zip(*map(parameters.split, pipeline.text_encoders), strict=True)
    positions = min(e.config.max_position_embeddings for e in pipeline.text_encoders)
    limit = min(positions, *(t.model_max_length for t in pipeline.tokenizers))
    cut = 0
    for start in range(0, len(prompts), batch_size):
        batch = list(prompts[start : start + batch_size])
        padded = batch + [""] * (batch_size - len(batch))  # one shape, one compilation
        ids = [
            tokenizer(padded, padding="max_length", max_length=limit, truncation=True)["input_ids"]
            for tokenizer in pipeline.tokenizers
        ]
        cut += sum(len(pipeline.tokenizers[0](p)["input_ids"]) > limit for p in batch)
        arrays = [jnp.asarray(i, jnp.int32) for i in ids]
        context, pooled, _ = _embed(pipeline.family, structures, params, arrays)
        context = np.asarray(context, np.float32)
        pooled = None if pooled is None else np.asarray(pooled, np.float32)
        for row in range(len(batch)):
            yield context[row], None if pooled is None else pooled[row]
    if cut:
        logging.warning(
            "%d of %d prompts are longer than the tokenizer takes and were cut", cut, len(prompts)
        )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _embed(family: Family, structures: tuple, params: tuple, ids: list[jax.Array]) -> Any:
    """Parameters are arguments: as constants they would be compiled in, gigabytes of them."""
    encoders = map(parameters.merge, structures, params)
    outputs = [encoder(i) for encoder, i in zip(encoders, ids, strict=True)]
    return family.embed(outputs, [None] * len(outputs))


def save_pipeline(unet: Any, source: epath.PathLike, out: epath.PathLike, **kw: Any) -> None:
    """The source pipeline with `unet` in place of its own; other parts are copied as they are.

    Every process must call it; process 0 writes, and none returns before all is written.
    model_index.json is the commit marker: taken away first, written last. `kw`: params,
    dtype and shard_bytes of `weights.save_model`.
    """
    source, out = find_folder(source), epath.Path(out)
    index = read_json(source / "model_index.json")
    if jax.process_index() == 0:
        out.mkdir(parents=True, exist_ok=True)
        (out / "model_index.json").unlink(missing_ok=True)
        for part in source.iterdir() if out.resolve() != source.resolve() else ():
            if part.name != "unet" and part.is_dir():
                _copy_folder(part, out / part.name)
    weights.save_unet(unet, out / "unet", **kw)
    if jax.process_index() == 0:
        storage.write_json(out / "model_index.json", index)
    processes.barrier(f"saved {out}")


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
