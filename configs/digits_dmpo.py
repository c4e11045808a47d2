"""The main job: aligns the packaged digits model with DMPO and measures the effect.

    python launch/train.py --config=configs/digits_dmpo.py

Takes minutes on two CPU cores. It samples pairs from the base, labels them by a judge as noisily
as people do, encodes, trains, and compares base and tuned model on held-out seeds by that
judge and by a second one. See `WORKDIR/samples/before_after.png` and `WORKDIR/result.json`.
"""

from dmpo_jax import config as base
from dmpo_jax.toy.digits import PIPELINE


def get_config():
    config = base.defaults()
    config.objective = "dmpo"
    # Errors of so small a model differ more than Stable Diffusion's. At its beta of 2000 the
    # gradient of nearly every pair vanishes, and the rest is noise.
    config.objectives.dmpo.beta = 300.0
    config.objectives.dmpo.alpha = 0.01
    config.jobs = ("collect", "encode", "train", "evaluate")
    config.model.folder = str(PIPELINE)
    config.model.compute_dtype = "float32"
    config.data.prompt_dropout = 0.0  # sampled without guidance: no empty prompt to learn
    config.data.validation_fraction = 0.1
    config.data.num_threads = 1
    config.train.steps = 150
    config.train.batch_size = 64
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 10
    config.optimizer.schedule = "cosine"
    config.mesh.cpu_devices = 2  # on two cores, a sixth faster than one device with both
    config.log.validate_every = 50
    config.log.sample_every = 75
    config.log.checkpoint_every = 50
    config.sample.steps = 20
    config.sample.guidance_scale = 1.0
    config.sample.batch_size = 80
    config.sample.prompts = str(PIPELINE / "prompts.txt")
    config.sample.count = 10
    config.collect.scorer = "digits_svm"
    config.collect.pairs = 1000
    # On scores in [0, 1]: a difference of 1 is labelled right 98 times in 100, of 0.2 69 times.
    config.collect.temperature = 0.25
    config.collect.tie_margin = 0.02
    config.evaluate.judges = ("digits_svm", "digits_forest")
    config.evaluate.seeds = 400
    config.evaluate.estimand = "these"  # ten captions are all there are
    return config
