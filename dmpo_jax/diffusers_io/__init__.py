"""A PyTorch diffusers folder <-> our modules.

`weights` is one model, `schedules` the scheduler's config, `pipeline` a whole folder.
"""

from dmpo_jax.diffusers_io.pipeline import (
    Pipeline,
    embed_prompts,
    load_family,
    load_pipeline,
    make_index,
    save_pipeline,
)
from dmpo_jax.diffusers_io.schedules import Sampling, load_schedule
from dmpo_jax.diffusers_io.weights import (
    find_folder,
    load_text_encoder,
    load_unet,
    load_vae,
    read_json,
    save_text_encoder,
    save_unet,
    save_vae,
    state_dict,
    to_jax,
    to_torch,
    torch_name,
    write_json,
)

__all__ = [
    "Pipeline",
    "Sampling",
    "embed_prompts",
    "find_folder",
    "load_family",
    "load_pipeline",
    "load_schedule",
    "load_text_encoder",
    "load_unet",
    "load_vae",
    "make_index",
    "read_json",
    "save_pipeline",
    "save_text_encoder",
    "save_unet",
    "save_vae",
    "state_dict",
    "to_jax",
    "to_torch",
    "torch_name",
    "write_json",
]
