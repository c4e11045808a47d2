"""Batches read by several processes over permuted meshes."""

import functools

import jax
import numpy as np
import pytest

from dmpo_jax.data.batches import pipeline
from dmpo_jax.data.batches.mixture import Mixture
from dmpo_jax.data.encoded import records
from dmpo_jax.data.encoded.pair import EncodedPair, flip_sizes
from dmpo_jax.data.encoded.prompt_store import PromptEmbedding
from dmpo_jax.parallel import meshes
from tests.support.encoded import write_pairs
from tests.support.meshes import permuted_mesh, pretend_process

BATCH, STEPS = 16, 5


def write(folder, first, count):
    """Pair i's moments are all first + i, mirrored their negative; its prompts are `first`'s."""

    def pair(i):
        moments = np.full((2, 2, 2, 4), first + i, np.float16)
        sizes = np.array([[16, 8, 5, 0, 8, 8], [8, 24, 0, 3 + i % 4, 8, 8]], np.int32)
        return EncodedPair(f"{first + i}", 1 + i % 4, 0.75, moments, sizes, flipped=-moments)

    prompts = [
        PromptEmbedding("p" * j, np.full((3, 2), first + j, np.float16), np.ones(4, np.float16))
        for j in range(5)
    ]
    meta = {"model": "tiny", "scaling_factor": 1.0}
    write_pairs(folder, {"train": map(pair, range(count))}, prompts, meta)
    return records.open_pairs(folder)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    return [write(folder / "a", 1, 37), write(folder / "b", 101, 22)]  # 16 divides neither


@pytest.fixture(params=["one", "mixture"])
def pairs(sets, request):
    return sets[0] if request.param == "one" else Mixture(sets, [2, 1])


def make(pairs, rows, **changes):
    options = {"seed": 7, "prompt_dropout": 0.3, "flip": True, "num_threads": 2, **changes}
    return pipeline.make_batches(pairs, "train", global_batch=BATCH, rows=rows, **options)


def shares(mesh, processes):
    """The rows of each of `processes` processes that share the mesh's devices."""
    sharding = meshes.batch_sharding(mesh)
    devices = np.array_split(np.array(jax.devices()), processes)
    return [meshes.local_rows(pretend_process(sharding, list(held)), BATCH) for held in devices]


def join(parts, rows):
    """One whole batch of the processes' parts."""
    back = np.argsort(np.concatenate(rows))
    return jax.tree.map(lambda *xs: np.concatenate(xs)[back], *parts)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


MESHES = {
    "plain": functools.partial(meshes.make_mesh, data=8),
    "permuted": permuted_mesh,
    "permuted, fsdp": functools.partial(permuted_mesh, 2, 4),
}


@pytest.mark.long
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_together_read_the_same_batches(pairs, mesh, processes):
    rows = shares(MESHES[mesh](), processes)
    readers = [make(pairs, held) for held in rows]
    whole = make(pairs, range(BATCH))
    for _ in range(STEPS):
        assert_same(join([next(reader) for reader in readers], rows), next(whole))


def test_rows_arrive_in_their_place_on_a_permuted_mesh(pairs):
    sharding = meshes.batch_sharding(permuted_mesh())
    local = next(make(pairs, meshes.local_rows(sharding, BATCH)))
    on_mesh = meshes.shard_batch(local, sharding, BATCH)
    assert_same(jax.device_get(on_mesh), next(make(pairs, range(BATCH))))


@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 4])
def test_a_restart_at_any_step_goes_on(pairs, processes):
    """On another number of processes too."""
    reader = make(pairs, range(BATCH))
    whole = [next(reader) for _ in range(STEPS + 1)]
    rows = shares(permuted_mesh(), processes)
    for start in range(STEPS):
        readers = [make(pairs, held, start_step=start) for held in rows]
        for want in whole[start : start + 2]:
            assert_same(join([next(reader) for reader in readers], rows), want)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_no_pair_twice_or_missing_in_an_epoch(sets, processes):
    """Sizes do not divide: 37 pairs, batches of 16, epochs that end inside a batch."""
    rows = shares(permuted_mesh(), processes)
    readers = [make(sets[0], held, flip=False) for held in rows]
    epochs, length = 3, len(sets[0].split("train"))
    batches = [
        join([next(reader) for reader in readers], rows)
        for _ in range(-(-epochs * length // BATCH))
    ]
    seen = np.concatenate([batch.moments[:, 0, 0, 0, 0] for batch in batches])
    for epoch in seen[: epochs * length].reshape(epochs, length):
        assert sorted(epoch) == list(range(1, length + 1))


def test_both_images_are_flipped_or_neither_and_half_of_the_pairs(sets):
    reader = make(sets[0], range(BATCH))
    moments = np.concatenate([next(reader).moments for _ in range(40)]).reshape(640, 2, -1)
    signs = np.sign(moments)
    assert (signs == signs[:, :1, :1]).all()
    flips = signs[:, 0, 0] < 0
    assert abs(flips.mean() - 0.5) < 4 * np.sqrt(0.25 / len(flips))
    plain = make(sets[0], range(BATCH), flip=False)
    unflipped = np.concatenate([next(plain).moments for _ in range(40)]).reshape(640, 2, -1)
    np.testing.assert_array_equal(np.abs(moments), unflipped)  # nothing else is drawn anew
    by_pair = [set(flips[unflipped[:, 0, 0] == i]) for i in range(1, 38)]
    assert {True, False} in by_pair  # drawn for the element, not the pair


def test_each_image_is_flipped_with_its_own_crop(sets):
    drawn = [next(reader) for reader in [make(sets[0], range(BATCH), flip_each=True)] * 40]
    plain = make(sets[0], range(BATCH), flip=False)
    seen = set()
    for batch, own in [(batch, next(plain)) for batch in drawn]:
        np.testing.assert_array_equal(np.abs(batch.moments), own.moments)
        flips = (batch.moments < 0).reshape(BATCH, 2, -1)
        assert (flips.all(-1) == flips.any(-1)).all()  # an image as a whole
        flips = flips.all(-1)
        mirrored = flip_sizes(own.condition.sizes.astype(np.int64))
        want = np.where(flips[..., None], mirrored, own.condition.sizes)
        np.testing.assert_array_equal(batch.condition.sizes, want)
        seen |= set(map(tuple, flips.tolist()))
    assert len(seen) == 4
    rows = shares(permuted_mesh(), 4)
    readers = [make(sets[0], held, flip_each=True) for held in rows]
    for want in drawn[:STEPS]:
        assert_same(join([next(reader) for reader in readers], rows), want)


def test_a_given_image_is_never_apart_from_one_of_its_pair(sets):
    pair = sets[0].split("train")[0]
    image = np.zeros((2, 2, 3), np.float16)
    shared = pair._replace(image=image, flipped_image=image + 1)
    assert shared.flip().image.max() == 1
    assert shared.flip((False, False)).image.max() == 0
    with pytest.raises(ValueError, match="which both of its images share: flip both"):
        shared.flip((True, False))


def test_sizes_are_the_images_own_or_the_resolution(sets):
    options = {"flip": False, "sizes": "resolution"}
    own, told = (
        next(make(sets[0], range(BATCH), flip=False)),
        next(make(sets[0], range(BATCH), **options)),
    )
    assert own.condition.sizes[0, 0].tolist() == [16, 8, 5, 0, 8, 8]
    assert (told.condition.sizes == [8, 8, 0, 0, 8, 8]).all()
    np.testing.assert_array_equal(told.moments, own.moments)
    epoch = pipeline.make_epoch(
        sets[0], "train", global_batch=BATCH, rows=range(BATCH), sizes="resolution"
    )
    assert all((batch.condition.sizes == [8, 8, 0, 0, 8, 8]).all() for batch, _ in epoch)


def test_flips_must_have_been_stored(tmp_path, sets):
    pair = sets[0].split("train")[0]._replace(flipped=None)
    prompts = list(sets[0].prompts)
    meta = {"model": "tiny", "scaling_factor": 1.0}
    write_pairs(tmp_path, {"train": [pair]}, prompts, meta)
    without = records.open_pairs(tmp_path)
    with pytest.raises(ValueError, match="the folder of encoded pairs does not hold them: encode"):
        make(without, range(BATCH))
    with pytest.raises(ValueError, match="folder 1 of the mixture of encoded pairs"):
        make(Mixture([sets[0], without], [1, 1]), range(BATCH))
    next(make(Mixture([sets[0], without], [1, 1]), range(BATCH), flip=False))
