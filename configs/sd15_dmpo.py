"""Aligns Stable Diffusion 1.5 (or any SD1.x, SD2.x pipeline folder) with DMPO.

    python launch/train.py --config=configs/sd15_dmpo.py --workdir=DIR \\
        --config.model.folder=stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --config.data.encoded=ENCODED   # made by launch/encode.py

Settings: beta, alpha, rate and batch of AIDC-AI/Diffusion-SDPO's launcher for DMPO on SD1.5,
without its safeguard: learning rate 1e-8 x 2048 pairs, 500 steps of warmup, 2,000 steps,
20 % empty prompts. That work trains on Pick-a-Pic v2.
`configs/sd15_dmpo.py:lora` trains adapters of rank 64 on the attention instead of every
parameter, at five times the rate: a starting point for tuning, not a published setting.
`configs/sd15_dmpo.py:debug` runs the same path at tiny width, without any file.
"""

from dmpo_jax import config as base


def get_config(variant: str = ""):
    config = base.defaults()
    config.objective = "dmpo"
    config.objectives.dmpo.beta = 2000.0
    config.objectives.dmpo.alpha = 0.01
    config.optimizer.learning_rate = 2.048e-5
    if variant == "lora":
        config.lora.rank = 64
        config.optimizer.learning_rate *= 5
    elif variant == "debug":
        base.debug(config, "sd")
    elif variant:
        raise ValueError(f"this config has the variants 'lora' and 'debug', but got {variant!r}")
    return config
