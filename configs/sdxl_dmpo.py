"""Aligns SDXL with DMPO.

    python launch/train.py --config=configs/sdxl_dmpo.py --workdir=DIR \\
        --config.model.folder=stabilityai/stable-diffusion-xl-base-1.0 \\
        --config.model.vae=madebyollin/sdxl-vae-fp16-fix \\
        --config.data.encoded=ENCODED \\
        --config.mesh.fsdp=16

ENCODED is made by launch/encode.py, with the same --model and --vae; mesh.fsdp shards parameters
and optimizer over that many chips.

Settings: beta, rate, warmup and steps are those of AIDC-AI/Diffusion-SDPO's launcher for DMPO on
SDXL (6000, 1e-9 x 2048 pairs, 500, 2,000), but by AdamW and without its safeguard: taken together
they are ours. `configs/published.py:sdxl_dmpo` has what the launcher does.
`configs/sdxl_dmpo.py:lora` trains adapters of rank 64 on the attention instead of every
parameter, at five times the rate: a starting point for tuning, not a published setting.
`configs/sdxl_dmpo.py:debug` runs the same path at tiny width, without any file.
"""

from dmpo_jax import config as base


def get_config(variant: str = ""):
    config = base.defaults()
    config.objective = "dmpo"
    config.objectives.dmpo.beta = 6000.0
    config.objectives.dmpo.alpha = 0.01
    config.optimizer.learning_rate = 2.048e-6
    # 70 transformer blocks: compiled once per kind, and recomputed in the backward.
    config.model.scan, config.model.remat = True, "transformer"
    if variant == "lora":
        config.lora.rank = 64
        config.optimizer.learning_rate *= 5
    elif variant == "debug":
        base.debug(config, "sdxl")
    elif variant:
        raise ValueError(f"this config has the variants 'lora' and 'debug', but got {variant!r}")
    return config
