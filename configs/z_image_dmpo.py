"""Aligns Z-Image with DMPO.

    python launch/train.py --config=configs/z_image_dmpo.py --workdir=DIR \\
        --config.model.folder=Tongyi-MAI/Z-Image \\
        --config.data.encoded=ENCODED \\
        --config.mesh.fsdp=16

ENCODED is made by launch/encode.py with the same --model. Train the base model: Z-Image-Turbo
loses its few steps.

Settings: no DMPO on a flow model is published, so beta is ours, to be tuned: `logit_p95` should
reach but not pass 4.6. Rate, batch and levels of noise are those of flow DPO on SD3
(Linear-DPO for all parameters, flow_grpo for adapters: rank 32, alpha 64). A guidance scale of 4
is one of 5 elsewhere, as in Z-Image's own pipeline.
`configs/z_image_dmpo.py:lora` trains adapters on the attention.
`configs/z_image_dmpo.py:debug` runs the same path at tiny width, without any file.
"""

from dmpo_jax import config as base


def get_config(variant: str = ""):
    config = base.defaults()
    config.objective = "dmpo"
    config.objectives.dmpo.beta = 1000.0
    config.objectives.dmpo.alpha = 0.01
    config.timesteps.density = "logit_normal"
    config.train.batch_size = 128
    config.optimizer.learning_rate = 5e-6
    config.optimizer.warmup_steps = 100
    # 30 equal transformer blocks: compiled once, and recomputed in the backward.
    config.model.scan, config.model.remat = True, "transformer"
    config.data.moments = "mean"
    config.sample.guidance_scale = 4.0
    config.sample.steps = 50
    if variant == "lora":
        config.lora.rank, config.lora.alpha = 32, 64.0
        config.optimizer.learning_rate = 3e-4
    elif variant == "debug":
        base.debug(config, "z_image")
    elif variant:
        raise ValueError(f"this config has the variants 'lora' and 'debug', but got {variant!r}")
    return config
