"""Trains the digits pipeline's flow transformer from random weights on the real digits, by sft.

    python launch/make_digits.py --family=sd3 --vae=dmpo_jax/toy/pipeline --out=runs/digits_flow
    python launch/train.py --config=configs/digits_flow_base.py --workdir=runs/digits_flow_base

The export of these two commands is `dmpo_jax/toy/flow_pipeline`. They took 12 minutes of CPU
time, half an hour by the clock on 2 cores that other jobs kept busy. The digits are then mostly
legible, and untidy; `configs/digits_flow_dmpo.py` aligns this base.
"""

from dmpo_jax import config as base

PIPELINE = "runs/digits_flow"


def get_config():
    config = base.defaults()
    config.objective = "sft"
    config.jobs = ("encode", "train")
    config.model.folder = PIPELINE
    config.model.compute_dtype = "float32"
    config.data.source = f"pickapic:{PIPELINE}/real_digits.parquet"
    config.data.prompt_dropout = 0.1
    config.data.validation_fraction = 0.0  # it would hold out a whole caption
    config.data.num_threads = 1
    config.timesteps.density = "logit_normal"
    config.train.steps = 1500
    config.train.batch_size = 32
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.schedule = "cosine"
    config.mesh.cpu_devices = 2
    config.log.validate_every = 0
    config.log.sample_every = 500
    config.log.checkpoint_every = 500
    config.sample.steps = 20
    config.sample.guidance_scale = 1.0
    config.sample.batch_size = 80
    config.sample.count = 10
    return config
