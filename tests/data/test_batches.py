"""Tests for dmpo_jax/data/batches/pipeline.py."""

import itertools

import jax
import numpy as np
import pytest

from dmpo_jax.data.batches import pipeline
from dmpo_jax.data.encoded import records
from dmpo_jax.data.encoded.pair import EncodedPair
from dmpo_jax.data.encoded.prompt_store import PromptEmbedding
from tests.support.encoded import write_pairs

PAIRS, PROMPTS, BATCH = 22, 5, 8  # 22: batches straddle epochs


def write(folder, pooled=True, image_kind=""):
    """Pair i's moments are all i, its prompt 1 + i % 4; prompt j's embeddings are all j.

    Its image, where there is one, is all i + 1."""

    def pair(i):
        moments = np.full((2, 2, 2, 4), i, np.float16)
        image = np.full((2, 2, 3), i + 1, np.float16) if image_kind else None
        return EncodedPair(f"{i}", 1 + i % 4, 0.75, moments, np.full((2, 6), i, np.int32), image)

    def prompt(j):
        vector = np.full(4, j, np.float16)
        return PromptEmbedding("p" * j, np.full((3, 2), j, np.float16), vector if pooled else None)

    meta = {"model": "tiny", "scaling_factor": 1.0, "image_kind": image_kind}
    write_pairs(folder, {"train": map(pair, range(PAIRS))}, map(prompt, range(PROMPTS)), meta)
    return records.open_pairs(folder)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write(tmp_path_factory.mktemp("pairs"))


def make(pairs, rows=range(BATCH), **changes):
    options = {"global_batch": BATCH, "seed": 7, "prompt_dropout": 0.3} | changes
    return pipeline.make_batches(pairs, "train", rows=rows, **options)


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def ids(batch):
    return batch.moments[:, 0, 0, 0, 0].astype(int)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_shapes_and_dtypes(pairs):
    (batch,) = take(make(pairs), 1)
    assert batch.moments.shape == (BATCH, 2, 2, 2, 4)
    assert batch.moments.dtype == np.float16
    np.testing.assert_array_equal(batch.preference, np.full(BATCH, 0.75, np.float32))
    assert batch.preference.dtype == np.float32
    given = batch.condition
    context, pooled, sizes = given.context, given.pooled, given.sizes
    assert given.image is None
    assert given.lengths is None
    assert context.shape == (BATCH, 3, 2)
    assert pooled.shape == (BATCH, 4)
    assert sizes.shape == (BATCH, 2, 6)
    assert sizes.dtype == np.float32
    np.testing.assert_array_equal(sizes[:, 0, 0], ids(batch))  # of the same pair
    np.testing.assert_array_equal(context[:, 0, 0], pooled[:, 0])


def test_without_pooled_there_are_no_sizes(tmp_path):
    (batch,) = take(make(write(tmp_path, pooled=False)), 1)
    assert batch.condition.pooled is None
    assert batch.condition.sizes is None


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("num_threads", [0, 3])
def test_batches_do_not_depend_on_who_reads_them(pairs, hosts, num_threads):
    permuted = np.random.default_rng(hosts).permutation(BATCH)
    shares = np.array_split(permuted, hosts)
    iterators = [make(pairs, rows=rows, num_threads=num_threads) for rows in shares]
    for want in take(make(pairs), 6):
        parts = [next(it) for it in iterators]
        whole = jax.tree.map(lambda *xs: np.concatenate(xs)[np.argsort(permuted)], *parts)
        assert_same(whole, want)


@pytest.mark.parametrize("start", [0, 1, 5])
def test_starting_at_a_step_equals_skipping_to_it(pairs, start):
    for a, b in zip(
        take(make(pairs, start_step=start), 3), take(make(pairs), start + 3)[start:], strict=True
    ):
        assert_same(a, b)


def counted(monkeypatch, store):
    """Makes one object's class note what is read of it; other objects may still be read."""
    read = []

    class Counted(type(store)):
        def __getitem__(self, i):
            read.append(i)
            return super().__getitem__(i)

    monkeypatch.setattr(store, "__class__", Counted)
    return read


def test_a_far_step_is_reached_at_once(pairs, monkeypatch):
    source = pairs.split("train")
    monkeypatch.setattr(pairs, "split", lambda _name: source)
    read = counted(monkeypatch, source)
    batch = pipeline.Batches(pairs, "train", global_batch=BATCH, rows=[0, 3], seed=7)[10**9]
    np.testing.assert_array_equal(ids(batch), read)  # and only this process's rows


def test_every_pair_once_an_epoch(pairs):
    epochs = 4
    batches = take(make(pairs), epochs * PAIRS // BATCH)
    seen = np.concatenate([ids(b) for b in batches]).reshape(epochs, PAIRS)
    for epoch in seen:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(PAIRS))
        assert (epoch != np.arange(PAIRS)).any()
    assert (seen[0] != seen[1]).any()  # reshuffled each epoch


def test_the_seed_decides_the_order(pairs):
    first, again, other = (take(make(pairs, seed=s), 1)[0] for s in (7, 7, 8))
    assert_same(first, again)
    assert (ids(first) != ids(other)).any()


def dropped(batches):
    return np.concatenate([b.condition.context[:, 0, 0] == 0 for b in batches])


def test_dropout_is_a_function_of_the_element_alone(pairs):
    base = dropped(take(make(pairs), 12))
    # The same elements, cut into batches of another size.
    other = dropped(take(make(pairs, rows=range(4), global_batch=4), 24))
    np.testing.assert_array_equal(base, other)
    # Not of the record: the same pair is dropped in one epoch and kept in another.
    batches = take(make(pairs), 4 * PAIRS // BATCH)
    record = np.argsort(np.concatenate([ids(b) for b in batches]).reshape(4, PAIRS), axis=1)
    by_record = np.take_along_axis(dropped(batches).reshape(4, PAIRS), record, axis=1)
    assert (by_record.any(0) & ~by_record.all(0)).any()


@pytest.mark.long
def test_dropout_rate(pairs):
    none, some, every = (
        dropped(take(make(pairs, prompt_dropout=p), 100)) for p in (0.0, 0.25, 1.0)
    )
    assert not none.any()
    assert every.all()
    assert abs(some.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / len(some))
    kept = take(make(pairs, prompt_dropout=0.0), 1)[0]
    np.testing.assert_array_equal(kept.condition.pooled[:, 0], 1 + ids(kept) % 4)


@pytest.fixture(scope="module")
def edits(tmp_path_factory):
    return write(tmp_path_factory.mktemp("edits"), image_kind="edit")


def lost(batches):
    """[elements, 2]: whether the prompt, and the image, is dropped."""
    images = np.concatenate([b.condition.image.any((1, 2, 3)) for b in batches])
    return np.stack([dropped(batches), ~images], axis=1)


@pytest.mark.long
def test_prompt_and_image_are_dropped_jointly(edits, pairs):
    p = 0.05
    batches = take(make(edits, prompt_dropout=2 * p), 200)
    assert batches[0].condition.image.shape == (BATCH, 2, 2, 3)
    assert batches[0].condition.image.dtype == np.float16
    found = lost(batches)
    tolerance = 4 * np.sqrt(p * (1 - p) / len(found))
    for prompt, image in ((True, False), (True, True), (False, True)):
        assert abs((found == [prompt, image]).all(1).mean() - p) < tolerance
    # The prompts' draws are those of pairs without images.
    np.testing.assert_array_equal(
        found[:, 0], dropped(take(make(pairs, prompt_dropout=2 * p), 200))
    )
    # A function of the element alone, however it is batched.
    other = lost(take(make(edits, rows=range(4), global_batch=4, prompt_dropout=2 * p), 400))
    np.testing.assert_array_equal(found, other)
    seen = np.concatenate([b.condition.image[:, 0, 0, 0] for b in batches])
    records_of = np.concatenate([ids(b) for b in batches])
    np.testing.assert_array_equal(seen[~found[:, 1]], 1 + records_of[~found[:, 1]])


def test_images_to_inpaint_and_validation_images_are_kept(tmp_path, edits):
    inpaint = write(tmp_path, image_kind="inpaint")
    found = lost(take(make(inpaint, prompt_dropout=1.0), 10))
    assert found[:, 0].all()
    assert not found[:, 1].any()
    epoch = pipeline.make_epoch(edits, "train", global_batch=BATCH, rows=range(BATCH))
    assert not lost([batch for batch, _ in epoch]).any()


def test_too_much_dropout_of_images_is_refused(edits):
    found = lost(take(make(edits, prompt_dropout=2 / 3), 100))
    assert found.any(1).all()
    with pytest.raises(ValueError, match=r"at most 2/3 .* but got 0.7"):
        make(edits, prompt_dropout=0.7)


@pytest.mark.parametrize("hosts", [1, 2])
def test_epoch_drops_nothing_and_weighs_padding_zero(pairs, hosts):
    shares = np.array_split(np.random.default_rng(0).permutation(BATCH), hosts)
    seen, steps = [], []
    for rows in shares:
        passed = list(pipeline.make_epoch(pairs, "train", global_batch=BATCH, rows=rows))
        steps.append(len(passed))
        for batch, weights in passed:
            assert batch.moments.shape[0] == len(weights) == len(rows)
            assert weights.dtype == np.float32
            seen.extend(ids(batch)[weights == 1])
    assert steps == [3] * hosts
    assert sorted(seen) == list(range(PAIRS))
    ((batch, _),) = take(
        pipeline.make_epoch(pairs, "train", global_batch=BATCH, rows=range(BATCH)), 1
    )
    np.testing.assert_array_equal(ids(batch), np.arange(BATCH))


def test_prompts_are_read_once(tmp_path, monkeypatch):
    pairs = write(tmp_path)
    read = counted(monkeypatch, pairs.prompts)
    take(make(pairs, num_threads=0), 20)
    assert sorted(read) == list(range(PROMPTS))


@pytest.mark.parametrize("rows", [[], [0, 0], [-1], [BATCH]])
def test_refuses_wrong_rows(pairs, rows):
    with pytest.raises(ValueError, match="rows must be distinct"):
        make(pairs, rows=rows)
    with pytest.raises(ValueError, match="rows must be distinct"):
        pipeline.make_epoch(pairs, "train", global_batch=BATCH, rows=rows)


@pytest.mark.parametrize("changes", [{"prompt_dropout": 1.5}, {"seed": -1}, {"seed": 2**32}])
def test_refuses_wrong_arguments(pairs, changes):
    with pytest.raises(ValueError, match=f"{next(iter(changes))} must lie in"):
        make(pairs, **changes)
