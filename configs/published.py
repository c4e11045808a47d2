"""Published settings by name, as in their launchers.

    python launch/train.py --config=configs/published.py:sd15_diffusion_dpo --workdir=DIR \\
        --config.data.encoded=ENCODED   # made by launch/encode.py --ties=drop --flip

`dmpo_jax/config/recipes.py` lists them with their sources: sd15_dmpo, sd15_diffusion_dpo,
sd15_diffusion_dpo_safeguarded, sd15_dspo, sdxl_dmpo, sdxl_diffusion_dpo,
sdxl_diffusion_dpo_safeguarded, sdxl_dspo, all 2,000 updates of 2,048 pairs of Pick-a-Pic v2, SDXL's
by Adafactor, encoded with --ties=drop --flip (docs/recipes.md); sd35_medium_diffusion_dpo
(adapters), sd3_medium_diffusion_dpo; and sd35_medium_dmpo, which is nobody's but ours. Take these
to reproduce what was published. `configs/sd15_dmpo.py` and `configs/sdxl_dmpo.py` are plain DMPO by
AdamW, without the safeguard that its launchers add: their settings are ours, and no published run
supports them.
"""

from dmpo_jax import config as base
from dmpo_jax.config import recipes

MODELS = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd3": "stabilityai/stable-diffusion-3-medium-diffusers",
    "sd35": "stabilityai/stable-diffusion-3.5-medium",
}


def get_config(name: str = "sd15_dmpo"):
    config = recipes.apply(base.defaults(), name)
    family = name.partition("_")[0]
    config.model.folder = MODELS[family]
    if family == "sdxl":
        config.model.vae = "madebyollin/sdxl-vae-fp16-fix"
    if family != "sd15":
        # 24 transformer blocks or more: compiled once per kind, and recomputed in the backward.
        config.model.scan, config.model.remat = True, "transformer"
    return config
