"""Small encoded pairs, written without a model."""

import numpy as np

from dmpo_jax.data.encoded import folder as records
from dmpo_jax.data.encoded.folder import EncodedPair, PromptEmbedding

META = {"model": "tiny-sd", "scaling_factor": 0.18215}


def make_pair(i, preference=0.75, dtype=np.float16, prompts=3):
    rng = np.random.default_rng(i)
    moments = rng.normal(size=(2, 4, 6, 8)).astype(dtype)
    sizes = rng.integers(0, 1024, (2, 6)).astype(np.int32)
    return EncodedPair(f"pair-{i}", i % prompts, preference, moments, sizes)


def make_imaged(i, **kw):
    image = np.random.default_rng(100 + i).normal(size=(4, 6, 5)).astype(np.float16)
    return make_pair(i, **kw)._replace(image=image)


def make_prompts(count=3, pooled=True, dtype=np.float16):
    for j in range(count):
        text = "ein Bär, höchstauflösend\n" * j
        context = np.full((5, 7), j, dtype)
        yield PromptEmbedding(text, context, np.full(4, 10 * j, dtype) if pooled else None)


def write(folder, splits=None, prompts=None, meta=META):
    splits = {"train": map(make_pair, range(40))} if splits is None else splits
    records.write_pairs(folder, splits, make_prompts() if prompts is None else prompts, meta)
