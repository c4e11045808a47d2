"""Trains the digits pipeline's UNet from random weights on the real digits, objective sft.

    python launch/make_digits.py --out=runs/digits
    python launch/train.py --config=configs/digits_base.py --workdir=runs/digits_base

Some minutes on 2 cores. Training stops when the digits are legible but often untidy or wrong;
`configs/digits_dmpo.py` then aligns this base.
"""

from dmpo_jax import config as base

PIPELINE = "runs/digits"


def get_config():
    config = base.defaults()
    config.objective = "sft"
    config.jobs = ("encode", "train")
    config.model.folder = PIPELINE
    config.model.compute_dtype = "float32"
    config.data.source = f"pickapic:{PIPELINE}/real_digits.parquet"
    config.data.prompt_dropout = 0.1
    config.data.validation_fraction = 0.05
    config.data.num_threads = 1
    config.train.steps = 900
    config.train.batch_size = 64
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.schedule = "cosine"
    config.mesh.cpu_devices = 2
    config.log.sample_every = 300
    config.log.checkpoint_every = 300
    config.sample.steps = 20
    config.sample.guidance_scale = 1.0
    config.sample.batch_size = 80
    config.sample.count = 10
    return config
