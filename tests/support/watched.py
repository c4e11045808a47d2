"""Runs of the real loop on a tiny model and made pairs, in seconds: what their curves look like."""

import json

import jax
import ml_dtypes
import numpy as np
from etils import epath

from dmpo_jax.data.encoded import records
from dmpo_jax.data.encoded.pair import EncodedPair
from dmpo_jax.data.encoded.prompt_store import PromptEmbedding
from dmpo_jax.diffusion.noise import make_flow_table
from dmpo_jax.models import parameters
from dmpo_jax.objectives import OBJECTIVES
from dmpo_jax.parallel import meshes
from dmpo_jax.training import build
from dmpo_jax.training.hooks import Validate
from dmpo_jax.training.loop import LoopSettings, run_loop
from dmpo_jax.training.telemetry import Cost
from tests.support.encoded import write_pairs
from tests.support.outside_family import FAMILY, KEYS, SIDE, TOKENS, OutsideTransformer2DModel

META = {"model": "outside", "pack": 2, "scaling_factor": [1.0] * 16, "shift_factor": [0.0] * 16}
DMPO = {"beta": 100.0, "alpha": 0.01}


def write(folder, *, told: float, preference: float = 1.0, train: int = 256, validation: int = 0):
    """Pairs whose images differ by `told` along one direction, which a model can learn.

    With told=0 the label says nothing about the images, as if it were drawn by lot.
    """
    rng = np.random.default_rng(0)
    shape = (2 * SIDE, 2 * SIDE, 4)
    way = rng.normal(size=shape)

    def pair(i):
        mean = rng.normal(size=(2, *shape)) + told * np.stack([way, -way])
        moments = np.concatenate([mean, np.full_like(mean, -10.0)], -1).astype(ml_dtypes.bfloat16)
        return EncodedPair(str(i), 1, preference, moments, np.full((2, 6), 64, np.int32))

    def prompt(j):
        context = np.random.default_rng(j).normal(size=(TOKENS, KEYS["text_width"]))
        length = np.array(TOKENS, np.int32)
        return PromptEmbedding("p" * j, context.astype(np.float16), length=length)

    splits = {"train": range(train), "validation": range(train, train + validation)}
    given = {name: map(pair, numbers) for name, numbers in splits.items() if numbers}
    write_pairs(folder, given, map(prompt, range(2)), META)
    return records.open_pairs(folder)


def run(
    workdir,
    pairs,
    *,
    steps=80,
    every=1,
    validate_every=0,
    start=None,
    rate=1e-4,
    warmup=0,
    page=None,
    hooks=(),
    **settings,
):
    """Trains as a job does, and returns (rows of metrics.jsonl, parameters).

    start: parameters that training begins with, measured against the model's own. Without, both
    are the model's own. page: `run_page.About`. hooks: further ones. settings: of
    `build.StepSettings`.
    """
    given = {
        "objective": OBJECTIVES["dmpo"],
        "hyperparameters": DMPO,
        "batch_size": 16,
        "rate": build.Rate(rate, warmup, steps),
        "optimizer": {"name": "adamw", "clip_norm": 1.0},
    }
    dtype = settings.get("compute_dtype", "float32")
    model = parameters.initialise(OutsideTransformer2DModel, KEYS, 2, dtype=dtype)
    built, params = build.build(
        FAMILY,
        model,
        make_flow_table(),
        pairs.meta,
        meshes.make_mesh(devices=jax.devices()[:1]),
        build.StepSettings(**{**given, **settings}),
    )
    key = built.make_key(0)
    state = built.make_state(dict(params) if start is None else dict(start))
    own = []
    if validate_every:
        own = [Validate(built, pairs, key, batch_size=512, every=validate_every)]
    state = run_loop(
        built,
        state,
        build.make_batches(built, pairs, seed=0),
        key,
        [*own, *hooks],
        LoopSettings(steps, every=every, tensorboard=False, page=page),
        workdir=epath.Path(workdir),
        cost=Cost(1, 1),
    )
    text = (epath.Path(workdir) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()], jax.device_get(state.params)
