"""Encoded pairs, written without a model by the pieces that `encode` writes with."""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from etils import epath

from dmpo_jax.data.encoded import prompt_store, records
from dmpo_jax.data.encoded.pair import EncodedPair, PairSerializer, chosen_first
from dmpo_jax.data.encoded.prompt_store import PromptEmbedding
from dmpo_jax.data.encoded.shards import ShardWriter

META = {"model": "tiny-sd", "scaling_factor": 0.18215}


def write_pairs(
    folder: epath.PathLike,
    splits: Mapping[str, Iterable[EncodedPair]],
    prompts: Iterable[PromptEmbedding],
    meta: Mapping[str, Any],
    *,
    pairs_per_shard: int = 1024,
) -> None:
    """Writes a complete folder of encoded pairs.

    Args:
        folder: leftovers of a write that did not finish are removed.
        splits: read once, by name, after the prompts.
        prompts: the first is the empty prompt.
        meta: as of `folder.finish`.
    """
    folder = epath.Path(folder)
    records.clear(folder)
    stored, found = [], []
    prompts = iter(prompts)
    while (chunk := list(itertools.islice(prompts, prompt_store.PER_SHARD))) or not stored:
        shard, shapes = prompt_store.write_prompts(folder, len(stored), chunk)
        stored.append(shard)
        found.append(shapes)
    count, serialize, written = sum(shard.records for shard in stored), None, {}
    for split in sorted(splits):
        pairs, written[split] = iter(splits[split]), []
        while (first := next(pairs, None)) is not None:
            serialize = serialize or PairSerializer(
                first,
                prompts=count,
                imaged=bool(meta.get("image_kind")),
                moments=meta.get("moments", "sample"),
            )
            with ShardWriter(folder, records.shard_name(split, len(written[split]))) as writer:
                for pair in [first, *itertools.islice(pairs, pairs_per_shard - 1)]:
                    writer.write(serialize(chosen_first(pair)))
                written[split].append(writer.close())
    assert serialize is not None, "no pairs"
    records.finish(folder, meta, written, stored, {**serialize.shapes, **found[0]})


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


def write(folder, splits=None, prompts=None, meta=META, **kw):
    splits = {"train": map(make_pair, range(40))} if splits is None else splits
    write_pairs(folder, splits, make_prompts() if prompts is None else prompts, meta, **kw)
