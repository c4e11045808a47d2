"""Tests for dmpo_jax/data/batches/mixture.py, and for batches of mixtures."""

import itertools
from typing import Any

import numpy as np
import pytest

from dmpo_jax.data.batches import pipeline
from dmpo_jax.data.batches.mixture import Mixture
from dmpo_jax.data.encoded import records
from dmpo_jax.data.encoded.pair import EncodedPair
from dmpo_jax.data.encoded.prompt_store import PromptEmbedding
from tests.support.encoded import write_pairs

BATCH = 8
META = {"model": "tiny", "scaling_factor": 1.0}


def write(folder, first, count, *, validation=0, width=2, meta=META, side=2):
    """Pair i's moments are all first + i, its prompt is 1; prompt j is all first + j."""

    def pair(i):
        moments = np.full((2, side, side, 4), first + i, np.float16)
        return EncodedPair(f"{first + i}", 1, 0.75, moments, np.zeros((2, 6), np.int32))

    prompts = [
        PromptEmbedding("p" * j, np.full((3, width), first + j, np.float16)) for j in range(2)
    ]
    splits = {"train": map(pair, range(count))}
    if validation:
        splits["validation"] = map(pair, range(count, count + validation))
    write_pairs(folder, splits, prompts, meta)
    return records.open_pairs(folder)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    return [
        write(folder / "a", 100, 10, validation=3),
        write(folder / "b", 200, 5),
        write(folder / "c", 300, 21, validation=2),
    ]


def take(mixture, count, rows: Any = range(BATCH), **changes):
    options = {"global_batch": BATCH, "seed": 3, "prompt_dropout": 0.3} | changes
    return list(
        itertools.islice(pipeline.make_batches(mixture, "train", rows=rows, **options), count)
    )


def ids(batches):
    return np.concatenate([b.moments[:, 0, 0, 0, 0] for b in batches]).astype(int)


@pytest.mark.long
def test_pairs_come_by_weight_with_prompts_of_their_own_set(sets):
    batches = take(Mixture(sets, [1, 1, 2]), 128)
    found = ids(batches) // 100
    assert [(found == s).sum() for s in (1, 2, 3)] == pytest.approx([256, 256, 512], abs=3)
    prompts = np.concatenate([b.condition.context[:, 0, 0] for b in batches])
    dropped = prompts % 100 == 0
    np.testing.assert_array_equal(prompts, 100 * found + ~dropped)
    assert abs(dropped.mean() - 0.3) < 4 * np.sqrt(0.21 / len(dropped))
    alone = take(sets[0], 128)  # the draws are the element's, not the pair's
    np.testing.assert_array_equal(
        dropped, np.concatenate([b.condition.context[:, 0, 0] == 100 for b in alone])
    )


def test_weighted_by_size_every_pair_is_as_frequent(sets):
    mixture = Mixture(sets, [pairs.meta.counts["train"] for pairs in sets])
    assert mixture.weights == (10, 5, 21)
    seen = np.unique(ids(take(mixture, 128)), return_counts=True)[1]
    assert len(seen) == 36
    assert seen.max() - seen.min() <= 2


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("start", [0, 5])
def test_a_mixture_does_not_depend_on_who_reads_it_or_since_when(sets, hosts, start):
    mixture = Mixture(sets, [3, 1, 2])
    want = ids(take(mixture, start + 4)[start:]).reshape(4, BATCH)
    for rows in np.array_split(np.random.default_rng(0).permutation(BATCH), hosts):
        got = ids(take(mixture, 4, rows=rows, start_step=start)).reshape(4, -1)
        np.testing.assert_array_equal(got, want[:, rows])


def test_a_mixture_of_one_is_that_one(sets):
    np.testing.assert_array_equal(ids(take(Mixture(sets[:1], [9]), 6)), ids(take(sets[0], 6)))


def test_validation_is_that_of_every_set_once(sets):
    mixture = Mixture(sets, [1, 1, 2])
    assert mixture.meta.counts == {"train": 36, "validation": 5, "prompts": 6}
    epoch = pipeline.make_epoch(mixture, "validation", global_batch=4, rows=range(4))
    seen = [ids([batch])[weights == 1] for batch, weights in epoch]
    assert np.concatenate(seen).tolist() == [110, 111, 112, 321, 322]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"width": 4}, r"0 and 1 .*shape of context: .*\[3, 2\].* and .*\[3, 4\]"),
        ({"side": 4}, "shape of moments"),
        ({"meta": {**META, "model": "other"}}, "model: 'tiny' and 'other'"),
        ({"meta": {**META, "scaling_factor": 0.5}}, "scaling_factor: 1.0 and 0.5"),
        ({"meta": {**META, "shift_factor": 0.5}}, "shift_factor: 0.0 and 0.5"),
        ({"meta": {**META, "vae": "fix"}}, "vae: '' and 'fix'"),
        ({"meta": {**META, "moments": "mean"}}, "moments: 'sample' and 'mean'"),
    ],
)
def test_refuses_sets_that_differ(sets, tmp_path, change, match):
    with pytest.raises(ValueError, match=rf"differ \(.*{match}|folders {match}"):
        Mixture([sets[0], write(tmp_path, 400, 2, **change)], [1, 1])


def test_what_need_not_agree(sets, tmp_path):
    other = write(tmp_path, 400, 2, meta={**META, "source": "elsewhere", "shift_factor": 0.0})
    assert Mixture([sets[0], other], [1, 1]).prompts is sets[0].prompts


def test_refuses_wrong_weights(sets):
    with pytest.raises(ValueError, match=r"3 folders need as many weights, but got \[1, 2\]"):
        Mixture(sets, [1, 2])
    with pytest.raises(ValueError, match="above 0"):
        Mixture(sets, [1, 2, 0])
    with pytest.raises(ValueError, match="at least one folder"):
        Mixture([], [])
