"""Aligns FLUX.2-klein with DMPO.

    python launch/train.py --config=configs/klein_dmpo.py --workdir=DIR \\
        --config.model.folder=black-forest-labs/FLUX.2-klein-base-4B \\
        --config.data.encoded=ENCODED \\
        --config.mesh.fsdp=16

ENCODED is made by launch/encode.py with the same --model. A prompt takes 7.9 MB there (512 tokens
of 7,680 numbers), an image of 512 pixels 65 kB by --moments=mean. Train the base model: the
distilled one loses its few steps.

Settings: no DMPO on a flow model is published, so beta is ours, to be tuned: `logit_p95` should
reach but not pass 4.6. Rate, batch and levels of noise are those of flow DPO on SD3
(Linear-DPO for all parameters, flow_grpo for adapters: rank 32, alpha 64).
`configs/klein_dmpo.py:lora` trains adapters on every attention and on the single blocks.
`configs/klein_dmpo.py:debug` runs the same path at tiny width, without any file.
"""

from dmpo_jax import config as base

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj", "attn.to_out")


def get_config(variant: str = ""):
    config = base.defaults()
    config.objective = "dmpo"
    config.objectives.dmpo.beta = 1000.0
    config.objectives.dmpo.alpha = 0.01
    config.timesteps.density = "logit_normal"
    config.train.batch_size = 128
    config.optimizer.learning_rate = 5e-6
    config.optimizer.warmup_steps = 100
    # 25 transformer blocks of two kinds: compiled once per kind, and recomputed in the backward.
    config.model.scan, config.model.remat = True, "transformer"
    config.data.moments = "mean"
    config.sample.guidance_scale = 4.0
    config.sample.steps = 50
    if variant == "lora":
        config.lora.rank, config.lora.alpha = 32, 64.0
        config.lora.targets = TARGETS
        config.optimizer.learning_rate = 3e-4
    elif variant == "debug":
        base.debug(config, "klein")
    elif variant:
        raise ValueError(f"this config has the variants 'lora' and 'debug', but got {variant!r}")
    return config
