"""A pipeline family that the package does not know: its model, its record, its folder.

Its model is so small that a run takes seconds: tests of what any run does use it, too.
"""

import contextlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from dmpo_jax import diffusers_io, families, storage
from dmpo_jax.families.family import Embedded, Facts, Family, TextPart, Tiny
from dmpo_jax.models import parameters
from dmpo_jax.models.clip import CLIPTextModel
from dmpo_jax.models.component_config import ModelConfig
from dmpo_jax.models.layers import Linear, layer_norm
from dmpo_jax.models.vae import AutoencoderKL
from dmpo_jax.toy import make

TOKENS, SIDE = 6, 4  # of a prompt; of the packed latents of an image of 64 pixels
KEYS = {"in_channels": 16, "hidden": 24, "text_width": 32, "grid": 4, "patch_size": 2}


class OutsideTransformer2DModel(nnx.Module):
    """Mixes an image's tokens with the mean of its text: enough to train, and no more."""

    def __init__(self, config: Any, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: Any):
        self.config = config = ModelConfig(config, KEYS, frozenset())
        kw: Any = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        width = config.hidden
        self.x_embedder = Linear(config.in_channels, width, **kw)
        self.context_embedder = Linear(config.text_width, width, **kw)
        self.time_embedder = Linear(2, width, **kw)
        self.norm_out = layer_norm(width, 1e-6, **kw)
        self.proj_out = Linear(width, config.in_channels, **kw)
        self.blocks = nnx.List(Linear(width, width, **kw) for _ in range(2))
        self.start_token = nnx.Param(jnp.zeros((1, width), param_dtype))  # of the model's root
        self.positions = parameters.Buffer(jnp.zeros((1, config.grid, config.grid, width)))

    def __call__(self, latents, sigma, context, lengths):
        valid = jnp.arange(context.shape[1])[None] < lengths[:, None]
        words = jnp.where(valid[..., None], self.context_embedder(context), 0)
        words = words.sum(1) / lengths[:, None].astype(words.dtype)
        wave = jnp.stack([jnp.sin(6 * sigma), jnp.cos(6 * sigma)], -1)
        told = words + self.time_embedder(wave) + self.start_token[...].astype(words.dtype)
        x = self.x_embedder(latents) + self.positions[...].astype(words.dtype)
        x = x + told[:, None, None]
        for block in self.blocks:
            x = x + jax.nn.silu(block(x))
        return self.proj_out(self.norm_out(x)).astype(jnp.float32)


class OutsideAutoencoderKL(AutoencoderKL):
    """The same network under another class name, its factors in vectors."""


def predict(model, latents, times, condition):
    return model(latents, times / 1000, condition.context, condition.lengths)


def facts(config) -> Facts:
    config = {**KEYS, **config}
    side = 2 * config["grid"]
    latents, width = (side, side), config["text_width"]
    return Facts(config["in_channels"], latents, width, 0, frozenset({1}), 2, lengths=True)


def embed(outputs, masks) -> Embedded:
    return Embedded(outputs[0].last_hidden_state, lengths=masks[0].sum(-1))


def factors(vae) -> tuple[tuple[float, ...], tuple[float, ...]]:
    channels = np.arange(16)
    return tuple((0.5 + channels / 16).tolist()), tuple((channels / 100 - 0.05).tolist())


FAMILY = Family(
    name="outside",
    pipeline="OutsidePipeline",
    text=(TextPart("text_encoder", tokens=TOKENS, template="a {}"),),
    embed=embed,
    model=OutsideTransformer2DModel,
    component="transformer",
    predict=predict,
    facts=facts,
    vae=OutsideAutoencoderKL,
    torch_class="OutsideTransformer2DModel",  # there is none
    torch_inputs=lambda latents, times, condition: {},
    pack=2,
    factors=factors,
    noise="flow",
    stored="bfloat16",
    guidance=lambda scale: (1 + scale, -scale),
    tiny=Tiny(model=KEYS, text={}),
)
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.35.0",
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 1,
    "max_image_seq_len": 4096,
    "shift_terminal": None,
}


@contextlib.contextmanager
def registered():
    """Inside, the package knows the family."""
    before = dict(families.FAMILIES)
    yield families.register(FAMILY)
    families.FAMILIES.clear()
    families.FAMILIES.update(before)


def write(folder, seed: int = 0, **keys) -> str:
    """A pipeline folder of random weights; `keys` of the transformer."""
    folder = epath.Path(folder)
    vocabulary = make.write_tokenizer(folder / "tokenizer")
    ids = {f"{k}_token_id": vocabulary[f"<|{t}|>"] for k, t in make.SPECIAL.items()}
    text = {**make.TEXT, "vocab_size": len(vocabulary), **ids}
    encoder = parameters.initialise(CLIPTextModel, text, seed)
    diffusers_io.save_text_encoder(encoder, folder / "text_encoder")
    vae = {**make.VAE, "_class_name": "OutsideAutoencoderKL", "block_out_channels": [8, 8, 16]}
    diffusers_io.save_vae(
        parameters.initialise(OutsideAutoencoderKL, vae, seed + 1), folder / "vae"
    )
    config = {"_class_name": "OutsideTransformer2DModel", **KEYS, **keys}
    model = parameters.initialise(OutsideTransformer2DModel, config, seed + 2)
    structure, params = parameters.split(model)
    rng = np.random.default_rng(seed)
    for path in ("start_token", "positions"):
        params[path] = jnp.asarray(rng.normal(size=params[path].shape), jnp.float32)
    model = parameters.merge(structure, params)
    diffusers_io.save_model(model, folder / "transformer")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    parts = {
        "scheduler": ("diffusers", SCHEDULER["_class_name"]),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "transformer": ("diffusers", "OutsideTransformer2DModel"),
        "vae": ("diffusers", "OutsideAutoencoderKL"),
    }
    index = diffusers_io.make_index(FAMILY.pipeline, parts)
    storage.write_json(folder / "model_index.json", index)
    return str(folder)
