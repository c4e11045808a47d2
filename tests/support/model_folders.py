"""Small models and their folders: PyTorch's, and ours filled with one number."""

import json

import jax.numpy as jnp
import numpy as np
import torch

from dmpo_jax import diffusers_io
from dmpo_jax.models import parameters
from dmpo_jax.models.clip import CLIPTextModel
from tests.support import torch_models

KINDS = {  # kind -> (a PyTorch model, load, save)
    "unet": (lambda s=0: torch_models.unet("small", s), "unet"),
    "vae": (lambda s=0: torch_models.vae("sdxl", s), "vae"),
    "clip_l": (lambda s=0: torch_models.clip("clip_l", s), "text_encoder"),
    "bigg": (lambda s=0: torch_models.clip("bigg", s), "text_encoder"),
}
DTYPES = {"float32": jnp.float32, "float16": jnp.float16, "bfloat16": jnp.bfloat16}


def load(kind, folder, **kw):
    return getattr(diffusers_io, f"load_{KINDS[kind][1]}")(folder, **kw)


def save(kind, model, folder, **kw):
    getattr(diffusers_io, f"save_{KINDS[kind][1]}")(model, folder, **kw)


def reopen(theirs, folder):
    """The folder as PyTorch opens it, in the dtype of `theirs`."""
    name = "dtype" if hasattr(theirs.config, "model_type") else "torch_dtype"
    return type(theirs).from_pretrained(folder, **{name: theirs.dtype})


def assert_bitwise(got, want):
    """Two dicts of tensors: the same names, shapes, dtypes and bits."""
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor), name


def weight_file(folder):
    (file,) = folder.glob("*.safetensors")
    return file


def edit_json(path, **changes):
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(config))


def shape_of(folder):
    return sorted(p.name for p in folder.iterdir())


UNET = {
    "block_out_channels": [8],
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
}
VAE = {"block_out_channels": [8], "norm_num_groups": 4, "mid_block_add_attention": False}


def filled(make, config, value):
    structure, params = parameters.split(parameters.initialise(make, config, 0))
    return parameters.merge(structure, {k: jnp.full_like(v, value) for k, v in params.items()})


def tiny_text(value, **changes):
    """A text encoder of ours filled with one number."""
    config = {**torch_models.CLIP, "hidden_size": 8, "intermediate_size": 8, "projection_dim": 8}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 2, "architectures": ["CLIPTextModel"]}
    return filled(CLIPTextModel, config | changes, value)


def values(model) -> set:
    """Every number that a model of ours holds, and the activation that its config names."""
    numbers = {float(v) for x in parameters.split(model)[1].values() for v in np.unique(x)}
    return numbers | ({model.config.hidden_act} if "hidden_act" in model.config else set())
