"""Loads a pipeline folder, embeds prompts, and writes the folder with another model."""

import functools
import logging
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from dmpo_jax import storage
from dmpo_jax.diffusers_io import components, parts
from dmpo_jax.diffusers_io.folders import component, read_json
from dmpo_jax.diffusers_io.schedules import Sampling, load_schedule
from dmpo_jax.diffusers_io.tokenizers import read_tokenizer
from dmpo_jax.diffusion.noise import NoiseTable
from dmpo_jax.errors import UserError
from dmpo_jax.families import FAMILIES, Family
from dmpo_jax.families.family import Embedded
from dmpo_jax.models import parameters
from dmpo_jax.models.clip import TextOutput
from dmpo_jax.parallel import meshes, placement, processes

VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")


class Pipeline(NamedTuple):
    """Parts of a pipeline besides its model, which is loaded separately.

    sampling: the sampler that scheduler_config.json names, and the settings of each sampler.
    zero_negative: no negative prompt means embeddings of zeros (SDXL's
        force_zeros_for_empty_prompt) rather than those of the empty prompt.
    text_mesh: devices that the text encoders are sharded over, with axis "fsdp"; None: they are on
        the default device.
    """

    folder: epath.Path
    family: Family
    vae: Any
    text_encoders: tuple[Any, ...]
    tokenizers: tuple[Any, ...]
    schedule: NoiseTable
    sampling: Sampling
    zero_negative: bool = False
    text_mesh: Mesh | None = None


def load_pipeline(
    folder: epath.PathLike,
    *,
    vae: str = "",
    variant: str | None = None,
    dtype: Any = jnp.float32,
    vae_dtype: Any = None,
    text: bool = True,
) -> Pipeline:
    """Loads all parts of a pipeline folder except its trained component.

    Args:
        folder: a diffusers pipeline folder or hub id.
        vae: folder of a VAE to use in place of the pipeline's own, such as SDXL's fp16-fix.
        dtype: compute dtype, in which text encoders are held too. vae_dtype: the VAE's, if it
            differs.
        text: False leaves out text encoders and tokenizers, which the folder may then lack;
            `with_text` adds them.

    Raises:
        ValueError: naming the part that is missing or unsupported.
    """
    path, family = components.load_family(folder)
    index = read_json(path / "model_index.json")
    schedule, sampling = load_schedule(path)
    pipeline = Pipeline(
        path,
        family,
        None,
        (),
        (),
        schedule,
        sampling,
        family.zero_negative and bool(index.get("force_zeros_for_empty_prompt", True)),
    )
    if text:
        pipeline = with_text(pipeline, variant=variant, dtype=dtype)
    loaded = components.load_vae(vae or path, variant=variant, dtype=vae_dtype or dtype)
    return pipeline._replace(vae=loaded)


def with_text(
    pipeline: Pipeline,
    *,
    variant: str | None = None,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
) -> Pipeline:
    """Returns the pipeline with its text encoders and tokenizers, loaded unless they are there.

    Args:
        variant, dtype: as of `load_pipeline`.
        mesh: devices to shard the text encoders over (`Pipeline.text_mesh`), a tensor at a time.

    Raises:
        ValueError: as `load_pipeline`.
    """
    if pipeline.text_encoders:
        return pipeline
    path, family = pipeline.folder, pipeline.family
    check_parts(path, family)
    sharding = None if mesh is None else functools.partial(meshes.parameter_sharding, mesh)
    tokenizers = [load_tokenizer(path, part.tokenizer) for part in family.text]
    encoders = [
        components.load_text_encoder(
            path,
            subfolder=part.name,
            layers=part.layers,
            variant=variant,
            dtype=dtype,
            # Half the memory in bfloat16: T5 takes 19 GB in float32.
            param_dtype=functools.partial(parameters.frozen_dtype, dtype=dtype),
            sharding=sharding,
        )
        for part in family.text
    ]
    return pipeline._replace(
        text_encoders=tuple(encoders), tokenizers=tuple(tokenizers), text_mesh=mesh
    )


def check_text(folder: epath.PathLike) -> None:
    """Raises ValueError if a pipeline's text encoders do not fit its model, or lack a tokenizer.

    Reads no weights.
    """
    path, family = components.load_family(folder)
    check_parts(path, family)
    for part in family.text:
        load_tokenizer(path, part.tokenizer)


def load_tokenizer(path: epath.Path, name: str) -> Any:
    """Loads a tokenizer of a pipeline folder, by the class in its tokenizer_config.json.

    Raises:
        ValueError: the folder has no such part, or its files are not valid.
    """
    if not (path / name / "tokenizer_config.json").exists():
        raise UserError(f"{path} lacks its {name!r} part (tokenizer_config.json)")
    if not any((path / name / file).exists() for file in VOCABULARIES):
        # T5's class would make a tokenizer that knows no word.
        raise UserError(
            f"{path / name} holds no valid tokenizer: none of {', '.join(VOCABULARIES)}"
        )
    config = read_json(path / name / "tokenizer_config.json")
    # Old CLIP folders name no class, and AutoTokenizer needs a config.json to infer one.
    clip = str(config.get("tokenizer_class", "CLIPTokenizer")).startswith("CLIPTokenizer")
    tokenizer = read_tokenizer(path / name, "CLIPTokenizer" if clip else "AutoTokenizer")
    if tokenizer.padding_side != "right":  # a text's length would not tell where it is
        raise UserError(
            f"{path / name} pads on the {tokenizer.padding_side} (padding_side); supported: right"
        )
    return tokenizer


def check_parts(path: epath.Path, family: Family) -> None:
    """Checks that the text encoders fit the model, from the parts' config.json files alone.

    Raises:
        ValueError: a part's class is not supported, or the family finds that it does not fit.
    """
    config = path / family.component / "config.json"
    if not config.exists():
        return  # loading the model raises
    texts = {
        part.name: read_json(component(path, part.name) / "config.json") for part in family.text
    }
    for name, text in texts.items():
        components.text_model(path / name, text)
    family.check_text(path, family.facts(read_json(config)), texts)


def embed_prompts(
    pipeline: Pipeline, prompts: Sequence[str], *, batch_size: int = 64
) -> Iterable[Embedded]:
    """Yields context [S, D], pooled [P] and length of each prompt, in order; float32 and int32.

    Each text part has its own template and number of tokens. Longer prompts are truncated;
    a warning gives their number. Devices of a `text_mesh` share the prompts of a batch.
    """
    structures, params = zip(*map(parameters.split, pipeline.text_encoders), strict=True)
    limits, absent = token_limits(pipeline), _absent(pipeline)
    mesh, cut = pipeline.text_mesh, 0
    if mesh is not None:
        batch_size = -(-batch_size // mesh.size) * mesh.size
    for start in range(0, len(prompts), batch_size):
        batch = list(prompts[start : start + batch_size])
        padded = batch + [""] * (batch_size - len(batch))  # one shape, one compilation
        ids, masks, over = [], [], np.zeros(len(batch), bool)
        for part, tokenizer, limit in zip(
            pipeline.family.text, pipeline.tokenizers, limits, strict=True
        ):
            texts = [part.template.format(prompt) for prompt in padded]
            tokens = tokenizer(texts, padding="max_length", max_length=limit, truncation=True)
            ids.append(jnp.asarray(tokens["input_ids"], jnp.int32))
            masks.append(jnp.asarray(tokens["attention_mask"], jnp.int32))
            whole = tokenizer(texts[: len(batch)], verbose=False)["input_ids"]
            over |= [len(tokens) > limit for tokens in whole]
        cut += int(over.sum())
        found = _embed(pipeline.family, structures, absent, mesh, params, ids, masks)
        yield from found.rows(len(batch))
    if cut:
        logging.warning(
            "%d of %d prompts are longer than the tokenizer takes and were cut", cut, len(prompts)
        )


def token_limits(pipeline: Pipeline) -> list[int]:
    """Returns the number of tokens that each text part is padded to.

    Parts without their own number share the smallest limit among them, because their states
    are concatenated.
    """
    free = [
        min(encoder.config.max_position_embeddings, tokenizer.model_max_length)
        for part, encoder, tokenizer in zip(
            pipeline.family.text, pipeline.text_encoders, pipeline.tokenizers, strict=True
        )
        if part.tokens is None
    ]
    return [min(free) if part.tokens is None else part.tokens for part in pipeline.family.text]


def _absent(pipeline: Pipeline) -> tuple[tuple[int, int], ...]:
    """Returns (tokens, width) of the zeros for each text encoder that the pipeline lacks."""
    family = pipeline.family
    if not family.absent:
        return ()
    config = read_json(pipeline.folder / family.component / "config.json")
    width = family.facts(config).context_width
    return tuple((part.tokens or 0, width) for part in family.absent)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _embed(
    family: Family,
    structures: tuple,
    absent: tuple[tuple[int, int], ...],
    mesh: Mesh | None,
    params: tuple,
    ids: list[jax.Array],
    masks: list[jax.Array],
) -> Embedded:
    """Embeds token ids. Parameters are arguments: constants would compile in gigabytes."""

    def run(params: tuple, ids: list[jax.Array], masks: list[jax.Array]) -> Embedded:
        encoders = map(parameters.merge, structures, params)
        outputs = [
            encoder(i, mask) if part.masked else encoder(i)
            for part, encoder, i, mask in zip(family.text, encoders, ids, masks, strict=True)
        ]
        for tokens, width in absent:
            zeros = jnp.zeros((ids[0].shape[0], tokens, width))
            outputs.append(TextOutput(zeros, (), zeros[:, 0]))
        context, pooled, lengths = family.embed(outputs, masks)
        return Embedded(
            context.astype(jnp.float32),
            None if pooled is None else pooled.astype(jnp.float32),
            None if lengths is None else lengths.astype(jnp.int32),
        )

    return placement.over_rows(run, mesh)(params, ids, masks)


def save_pipeline(
    model: Any, source: epath.PathLike, out: epath.PathLike, *, vae: str = "", **kw: Any
) -> None:
    """Writes the source pipeline with `model` in place of its own; copies the other parts.

    vae: folder of a VAE to write in place of the source's own, or "".

    Every process must call it. Process 0 writes; a barrier follows. model_index.json is the
    commit marker: removed first, written last. `kw`: params, dtype and shard_bytes of
    `weights.save_weights`.

    Raises:
        ValueError: as `parts.check_copy`, before anything is written.
    """
    source, family = components.load_family(source)
    out = epath.Path(out)
    index = read_json(source / "model_index.json")
    copied = parts.check_copy(source, out, family.component)
    if vae:
        copied["vae"] = component(vae, "vae")
    if jax.process_index() == 0:
        out.mkdir(parents=True, exist_ok=True)
        (out / "model_index.json").unlink(missing_ok=True)
        for name, part in copied.items():
            parts.copy_part(part, out / name)
    components.save_model(model, out / family.component, **kw)
    if jax.process_index() == 0:
        storage.write_json(out / "model_index.json", index)
    processes.barrier(f"saved {out}")


def check_export(source: epath.PathLike, out: epath.PathLike) -> None:
    """Raises ValueError if `out` is the source, or `save_pipeline` would refuse to write to it."""
    path, family = components.load_family(source)
    if parts.is_same(path, out):
        raise UserError(f"{out} is the model that is trained: choose another folder for the export")
    parts.check_copy(path, out, family.component)


def make_index(kind: str, parts: dict[str, tuple[str | None, str | None]]) -> dict[str, Any]:
    """Returns model_index.json of a pipeline class. parts: part -> (library, class) or Nones."""
    if kind not in FAMILIES:
        raise UserError(f"{kind!r} is not supported; supported pipelines: {sorted(FAMILIES)}")
    # PyTorch's inpainting pipeline requires a version above 0.5.1.
    about = {"_class_name": kind, "_diffusers_version": "0.30.0"}
    return {**about, **{k: list(v) for k, v in parts.items()}}
