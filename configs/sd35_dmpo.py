"""Aligns Stable Diffusion 3.5 (medium or large, or SD3-medium) with DMPO.

    python launch/train.py --config=configs/sd35_dmpo.py --workdir=DIR \\
        --config.model.folder=stabilityai/stable-diffusion-3.5-medium \\
        --config.data.encoded=ENCODED \\
        --config.mesh.fsdp=16

ENCODED is made by launch/encode.py, with the same --model; mesh.fsdp shards parameters and
optimizer over that many chips: 40 GB for SD3.5-medium, 145 GB for SD3.5-large.

No settings of DMPO on a flow model are published: these are a starting point. beta 1000, alpha
0.01, learning rate 5e-6 for 128 pairs, 100 updates of warmup, logit-normal timesteps. Watch
`logit_p95` and `saturation`: u should reach but not pass 4.6, the logit of 1 - alpha.
`configs/sd35_dmpo.py:lora` trains adapters of rank 32 on the joint attention, at 3e-4.
`configs/sd35_dmpo.py:debug` runs the same path at tiny width, without any file.
"""

from dmpo_jax import config as base
from dmpo_jax.config import recipes


def get_config(variant: str = ""):
    config = recipes.apply(base.defaults(), "sd35_medium_dmpo")
    # 24 transformer blocks in three kinds: each compiled once, and recomputed in the backward.
    config.model.scan, config.model.remat = True, "transformer"
    if variant == "lora":
        config.update_from_flattened_dict(recipes.SD3_LORA)
    elif variant == "debug":
        base.debug(config, "sd3")
    elif variant:
        raise ValueError(f"this config has the variants 'lora' and 'debug', but got {variant!r}")
    return config
