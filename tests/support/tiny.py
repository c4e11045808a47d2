"""A pipeline small enough to compile in seconds, its encoded pairs, and a config for both."""

import dataclasses

from etils import epath

from dmpo_jax import diffusers_io
from dmpo_jax.config import configs
from dmpo_jax.data import sources
from dmpo_jax.encoding import encode as encoding
from dmpo_jax.encoding.plan import Settings
from dmpo_jax.families import SD
from dmpo_jax.families.family import Tiny
from dmpo_jax.toy import debug

FAMILY = dataclasses.replace(
    SD,
    tiny=Tiny(
        model={
            "sample_size": 8,
            "block_out_channels": [8],
            "down_block_types": ["CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D"],
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "cross_attention_dim": 16,
            "attention_head_dim": 2,
        },
        text={"text_encoder": {"hidden_size": 16}},
    ),
)


def write_model(folder) -> None:
    debug.write_tiny_pipeline(epath.Path(folder), FAMILY)


def write(folder, write_model=write_model) -> tuple[str, str]:
    """(model folder, encoded folder): 64 pairs of noise, a quarter of them for validation."""
    folder = epath.Path(folder)
    model, encoded = folder / "model", folder / "encoded"
    write_model(model)
    sources.write_pick_a_pic(folder / "pairs.parquet", debug.synthetic_pairs(64))
    source = f"pickapic:{folder / 'pairs.parquet'}"
    encode(source, model, encoded, validation_fraction=0.25)
    return str(model), str(encoded)


def encode(source: str, model, out, **changes) -> None:
    """Encodes in float32; `changes` of the settings that tests start from."""
    settings = {
        "source": source,
        "model": str(model),
        "vae": "",
        "variant": None,
        "dtype": "float32",
        "resolution": None,
        "validation_fraction": 0.01,
        "moments": "sample",
        "moments_dtype": "bfloat16",
        "flip": False,
        "crop": "center",
        "ties": "keep",
        "max_bad": 0.01,
        "allow_outside": False,
        "batch_size": 32,
        "num_threads": 4,
    }
    encoding.encode(Settings(**{**settings, **changes}), diffusers_io.load_pipeline(model), out)


def make_config(model: str, encoded: str, **leaves):
    """A training config over them; `leaves` by dotted path with __ for the dot."""
    config = configs.defaults()
    values = {
        "model.folder": model,
        "model.compute_dtype": "float32",
        "data.encoded": encoded,
        "data.num_threads": 1,
        "train.steps": 6,
        "train.batch_size": 8,
        "optimizer.learning_rate": 1e-3,
        "optimizer.warmup_steps": 2,
        "log.every": 1,
        "log.validate_every": 3,
        "log.sample_every": 0,
        "log.checkpoint_every": 2,
        **{path.replace("__", "."): value for path, value in leaves.items()},
    }
    return configs.from_flat({**configs.flatten(config), **values})
