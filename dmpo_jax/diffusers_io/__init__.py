"""Reads and writes PyTorch diffusers folders.

`pipeline` handles a complete folder, `parts` copies what is not trained, `components` handles
one part by class, `weights` one model, `lora_file` adapters, `kohya` their other names, `loras`
merges them; `schedules` the scheduler's config; `digests` tells weights apart; `starts` finds
weights that stand in place of a pipeline's own.
Below them: `folders` (which files, hub ids), `layout` (names and axes), `tensor_files`
(safetensors, one tensor at a time) and `placement` (arrays between host and devices).
"""

from dmpo_jax.diffusers_io.components import (
    load_family,
    load_model,
    load_text_encoder,
    load_unet,
    load_vae,
    save_model,
    save_text_encoder,
    save_unet,
    save_vae,
)
from dmpo_jax.diffusers_io.digests import digest_encoders, digest_model, digest_variants
from dmpo_jax.diffusers_io.folders import find_folder, hub_id, is_hub_id, pinned, read_json, resolve
from dmpo_jax.diffusers_io.layout import to_jax, to_torch, torch_name
from dmpo_jax.diffusers_io.lora_file import FILE as LORA_FILE
from dmpo_jax.diffusers_io.lora_file import KEYS as LORA_KEYS
from dmpo_jax.diffusers_io.lora_file import load_lora, save_lora
from dmpo_jax.diffusers_io.loras import Lora, check_loras, merge_loras, parse_loras
from dmpo_jax.diffusers_io.pipeline import (
    Pipeline,
    check_export,
    check_text,
    embed_prompts,
    load_pipeline,
    make_index,
    save_pipeline,
    with_text,
)
from dmpo_jax.diffusers_io.schedules import Sampling, load_schedule
from dmpo_jax.diffusers_io.starts import Start, find_start
from dmpo_jax.diffusers_io.tensor_files import check_finite
from dmpo_jax.diffusers_io.weights import SHARD_BYTES, state_dict

__all__ = [
    "LORA_FILE",
    "LORA_KEYS",
    "SHARD_BYTES",
    "Lora",
    "Pipeline",
    "Sampling",
    "Start",
    "check_export",
    "check_finite",
    "check_loras",
    "check_text",
    "digest_encoders",
    "digest_model",
    "digest_variants",
    "embed_prompts",
    "find_folder",
    "find_start",
    "hub_id",
    "is_hub_id",
    "load_family",
    "load_lora",
    "load_model",
    "load_pipeline",
    "load_schedule",
    "load_text_encoder",
    "load_unet",
    "load_vae",
    "make_index",
    "merge_loras",
    "parse_loras",
    "pinned",
    "read_json",
    "resolve",
    "save_lora",
    "save_model",
    "save_pipeline",
    "save_text_encoder",
    "save_unet",
    "save_vae",
    "state_dict",
    "to_jax",
    "to_torch",
    "torch_name",
    "with_text",
]
