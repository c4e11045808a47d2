"""Tests for dmpo_jax/encoding: raw pairs in, the same files out however it was run."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath

from dmpo_jax import diffusers_io, storage
from dmpo_jax.data import sources
from dmpo_jax.data.encoded import records
from dmpo_jax.data.encoded.pair import flip_sizes
from dmpo_jax.data.sources.bad_records import TooManyBadError
from dmpo_jax.encoding import encode as job
from dmpo_jax.encoding import pairs as encode_pairs
from dmpo_jax.encoding import parts as encode_parts
from dmpo_jax.encoding import pixels, vae
from dmpo_jax.families import SD_INPAINT
from dmpo_jax.models import parameters
from dmpo_jax.toy import debug
from tests.support import launched, raw_sources, tiny
from tests.support.raw_pairs import png, read

ROWS = (7, 5, 9, 6)  # of the files: every one a unit, and 8 pairs make a batch
SIDE = 32


def make_rows(count, seed, shape=(40, 57)):
    """Images of colours and noise; captions that recur over the files."""
    rng = np.random.default_rng(seed)

    def image():
        noise = rng.integers(0, 64, (*shape, 3)) + rng.integers(0, 192, 3)
        noise[: shape[0] // 2, : shape[1] // 3] //= 4
        return png(noise.astype(np.uint8))

    return [
        {
            "caption": f"a handwritten {rng.choice(['one', 'two', 'six'])} {i % 4 + seed}",
            "jpg_0": image(),
            "jpg_1": image(),
            "label_0": (1.0, 0.0, 0.5)[i % 3],
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(source, model): several files of pairs, and a tiny pipeline."""
    folder = epath.Path(tmp_path_factory.mktemp("made"))
    for i, count in enumerate(ROWS):
        sources.write_pick_a_pic(folder / "pairs" / f"{i}.parquet", make_rows(count, i))
    debug.write_tiny_pipeline(folder / "model", tiny.FAMILY)
    return f"pickapic:{folder / 'pairs'}", str(folder / "model")


SETTINGS = {"validation_fraction": 0.3, "batch_size": 8, "pairs_per_shard": 6, "num_threads": 2}


def encode(made, out, **changes):
    source, model = made
    tiny.encode(source, model, out, **{**SETTINGS, **changes})
    return records.open_pairs(out)


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    """An encoding that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    encode(made, out)
    return out


def files_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def assert_same_files(a, b):
    a, b = files_of(a), files_of(b)
    assert set(a) == set(b)
    assert [name for name in a if a[name] != b[name]] == []


def stored(pairs):
    """Every pair by id, with its split."""
    return {
        pair.id: (split, pair)
        for split in records.SPLITS
        if split in pairs.meta.counts
        for pair in pairs.split(split)
    }


# --- what is encoded ------------------------------------------------------------


@pytest.mark.long
def test_every_pair_is_there_once(made, whole):
    pairs = records.open_pairs(whole)
    raw = {pair.id: pair for pair in read(sources.open_source(made[0]))}
    found = stored(pairs)
    assert len(raw) == sum(ROWS)
    assert set(found) == set(raw)
    assert pairs.meta.counts["train"] + pairs.meta.counts["validation"] == sum(ROWS)
    for name, (_, pair) in found.items():
        assert pairs.prompts[pair.prompt].text == raw[name].prompt
        assert pair.preference == max(raw[name].preference, 1 - raw[name].preference)
    assert len(list(whole.glob("*train.array_record-*"))) == 4


def test_prompts_are_numbered_by_first_occurrence(made, whole, monkeypatch):
    texts = [prompt.text for prompt in records.open_pairs(whole).prompts]
    assert texts == list(
        dict.fromkeys(["", *(pair.prompt for pair in read(sources.open_source(made[0])))])
    )


def test_no_prompt_is_on_both_sides(whole):
    by_split = {split: set() for split in records.SPLITS}
    for split, pair in stored(records.open_pairs(whole)).values():
        by_split[split].add(pair.prompt)
    assert all(by_split.values())
    assert not by_split["train"] & by_split["validation"]


def test_held_out_prompts():
    prompts = ["", *(f"prompt {i}" for i in range(2000))]
    held = encode_parts.held_out_prompts(prompts, 0.1)
    assert 0.07 < len(held) / 2000 < 0.13
    assert held == {p for p in encode_parts.held_out_prompts(prompts[::-1], 0.1) if p in prompts}
    assert held <= encode_parts.held_out_prompts(prompts, 0.2)
    assert encode_parts.held_out_prompts(prompts, 0) == set()
    for few in (["", "a", "b"], ["", "a", "b", "c"]):  # some on either side
        for fraction in (1e-9, 1 - 1e-9):
            held = encode_parts.held_out_prompts(few, fraction)
            assert 0 < len(held - {""}) < len(few) - 1
    assert encode_parts.held_out_prompts(["", "a"], 1e-9) == set()


def test_tfds_opens_it(whole):
    builder = tfds.builder_from_directory(whole)
    source = builder.as_data_source("train")
    assert len(source) == records.open_pairs(whole).meta.counts["train"]
    first = records.open_pairs(whole).split("train")[0]
    np.testing.assert_array_equal(source[0]["moments"], first.moments)


# --- the bytes do not depend on how it was run ----------------------------------


def run_processes(monkeypatch, made, out, count, **changes):
    """`count` simulated processes, each a thread, that wait for one another."""
    kept = []
    with monkeypatch.context() as patch:
        patch.setattr(job, "run", lambda work, plan, *_: kept.append((work, plan)))
        with pytest.raises(FileNotFoundError):  # nothing is written yet
            encode(made, out, **changes)
    work, plan = kept[0]
    barrier, errors = threading.Barrier(count), []

    def process(index):
        try:
            job.run(work, plan, index, count, lambda name: barrier.wait(timeout=60))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=process, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.long
@pytest.mark.parametrize("count", [2, 4])  # `whole` is of one
def test_any_number_of_processes_writes_the_same_files(count, made, whole, tmp_path, monkeypatch):
    run_processes(monkeypatch, made, tmp_path / "out", count)
    assert_same_files(whole, tmp_path / "out")


SCRIPT = """
import sys, jax
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", sys.argv[4])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
from tests.support.tiny import encode
encode(*sys.argv[1:4], validation_fraction=0.3,
       batch_size=8, pairs_per_shard=6, num_threads=2)
"""


def start(made, out, cache):
    env = os.environ | {"PYTHONPATH": str(launched.ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SCRIPT, *made, str(out), str(cache)]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


def kill_and_go_on(made, out, cache, kills, draw):
    """SIGKILLs `kills` runs when so many files are there as are drawn; then lets one end."""
    most = 4 + 4 * len(ROWS) + 2
    killed = 0
    for _ in range(kills):
        process = start(made, out, cache)
        have = len(list(out.rglob("*"))) if out.exists() else 0
        until, pause = draw.randint(min(have + 1, most), most), draw.uniform(0, 0.02)
        while process.poll() is None:
            if out.exists() and len(list(out.rglob("*"))) >= until:
                time.sleep(pause)
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.001)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        if killed and not (out / records.MARKER).exists():
            with pytest.raises((records.IncompleteError, FileNotFoundError)):
                records.open_pairs(out)
    process = start(made, out, cache)
    errors = process.communicate()[1]
    assert process.returncode == 0, errors
    return killed


@pytest.mark.long
@pytest.mark.parametrize(("kills", "seed"), [(2, 0), pytest.param(10, 1, marks=pytest.mark.slow)])
def test_a_killed_encode_goes_on_to_the_same_bytes(kills, seed, made, whole, tmp_path):
    out = tmp_path / "out"
    assert kill_and_go_on(made, out, tmp_path / "xla", kills, random.Random(seed)) >= 1
    assert_same_files(whole, out)


class KilledError(BaseException):
    pass


@pytest.mark.long
@pytest.mark.parametrize("where", ["prompts-00001", "pairs-00002"])
def test_what_is_done_is_not_done_again(where, made, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    save = storage.write_json

    def dying(path, value):
        if where in path.name:
            raise KilledError
        save(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_json", dying)
        with pytest.raises(KilledError):
            encode(made, out)
    assert not list(out.glob(".*"))
    before = {path: path.stat().st_mtime_ns for path in (out / "parts").iterdir()}
    encode(made, out)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert_same_files(whole, out)


@pytest.mark.long
def test_a_shard_that_was_cut_short_is_made_again(made, whole, tmp_path):
    out = tmp_path / "out"
    encode(made, out)
    shard = out / records.shard_name("train", 1)
    os.truncate(shard, shard.stat().st_size // 2)
    encode(made, out)
    assert_same_files(whole, out)


@pytest.mark.long
def test_another_encoding_is_refused(made, whole, tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match=r"another encoding .*moments: 'sample' there, 'mean' asked"
    ):
        encode(made, whole, moments="mean")
    with pytest.raises(ValueError, match="crop: 'center' there, 'random' asked"):
        encode(made, whole, crop="random")
    monkeypatch.setattr(encode_pairs, "finish", lambda *_: None)
    with pytest.raises(records.IncompleteError):
        encode(made, tmp_path)
    with pytest.raises(ValueError, match=r"unfinished encoding .*flipped: False there, True asked"):
        encode(made, tmp_path, flip=True)
    encode(made, whole)  # the same one: nothing to do


@pytest.mark.long
def test_a_source_that_merely_moved_is_the_same(made, whole, tmp_path, monkeypatch):
    source, model = made
    before = files_of(whole)
    moved = tmp_path / "elsewhere"
    shutil.copytree(source.partition(":")[2], moved)
    encode((f"pickapic:{moved}", model), whole)
    assert files_of(whole) == before

    with monkeypatch.context() as patch:
        patch.setattr(encode_pairs, "finish", _stop)
        with pytest.raises(KeyboardInterrupt):
            encode(made, tmp_path / "out")
    written = (tmp_path / "out" / records.shard_name("train", 0)).stat().st_mtime_ns
    encode((f"pickapic:{moved}", model), tmp_path / "out")
    assert (tmp_path / "out" / records.shard_name("train", 0)).stat().st_mtime_ns == written

    sources.write_pick_a_pic(moved / "1.parquet", make_rows(ROWS[1], 99))
    with pytest.raises(ValueError, match=r"another encoding .*1\.parquet"):
        encode((f"pickapic:{moved}", model), whole)
    (moved / "1.parquet").unlink()
    with pytest.raises(ValueError, match=r"another encoding .*1\.parquet"):
        encode((f"pickapic:{moved}", model), whole)


def test_settings_that_do_not_exist_are_refused(made, tmp_path):
    with pytest.raises(
        ValueError, match="crop should be one of 'center', 'random', but got 'left'"
    ):
        encode(made, tmp_path, crop="left")


def test_a_process_whose_files_are_not_seen_is_named(made, tmp_path, monkeypatch):
    monkeypatch.setattr(encode_pairs, "write_pairs", lambda *_: None)
    with pytest.raises(ValueError, match=r"pairs-00000.json is missing: is .* processes share"):
        encode(made, tmp_path)


TWO_PROCESSES = """
import sys, jax
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
from dmpo_jax.parallel import processes
processes.join()
from tests.support.tiny import encode
encode(*sys.argv[1:4], validation_fraction=0.3,
       batch_size=8, pairs_per_shard=6, num_threads=2)
"""


@pytest.mark.slow
def test_two_real_processes_write_the_same_files(made, whole, tmp_path):
    launched.run_script(TWO_PROCESSES, *made, tmp_path / "out")
    assert_same_files(whole, tmp_path / "out")


# --- images ---------------------------------------------------------------------


def expected(made, found, **settings):
    """The VAE's own moments, float32, of `Pixels`."""
    pipeline = diffusers_io.load_pipeline(made[1])
    run = vae.make_run(pipeline, **settings)
    params = parameters.split(pipeline.vae)[1]
    return np.asarray(run(params, np.stack([x.images for x in found]), None, None)[0])


# Half a unit in the last place; XLA may round intermediates differently in another program.
ROUNDING = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 1e-5}


@pytest.fixture(scope="module")
def mirrored(made, tmp_path_factory):
    return encode(made, tmp_path_factory.mktemp("flip") / "out", flip=True, moments_dtype="float32")


def check_moments(made, pairs, moments, dtype):
    raw = read(sources.open_source(made[0]))[:8]
    want = expected(made, [pixels.load_pixels(pair, (), SIDE) for pair in raw])
    assert want.shape[-1] == 8
    want = want[..., :4] if moments == "mean" else want
    found = stored(pairs)
    for pair, own in zip(raw, want, strict=True):
        got = found[pair.id][1].moments
        assert got.dtype == np.dtype(dtype)
        own = own[::-1] if pair.preference < 0.5 else own
        np.testing.assert_allclose(got.astype(np.float32), own, rtol=ROUNDING[dtype], atol=1e-5)
    assert pairs.meta.moments == moments
    assert pairs.meta.moments_dtype == dtype


@pytest.mark.long
def test_moments_are_the_vaes_but_for_rounding(made, whole, mirrored, tmp_path):
    check_moments(made, records.open_pairs(whole), "sample", "bfloat16")
    check_moments(made, mirrored, "sample", "float32")
    mean = encode(made, tmp_path / "out", moments="mean", moments_dtype="float16")
    check_moments(made, mean, "mean", "float16")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moments", "dtype"), [("mean", "bfloat16"), ("mean", "float32"), ("sample", "float16")]
)
def test_other_moments_are_the_vaes_but_for_rounding(moments, dtype, made, tmp_path):
    pairs = encode(made, tmp_path / "out", moments=moments, moments_dtype=dtype)
    check_moments(made, pairs, moments, dtype)


def test_flips_are_of_both_images(made, mirrored):
    assert mirrored.meta.flipped
    raw = read(sources.open_source(made[0]))[:8]
    loaded = [pixels.load_pixels(pair, (), SIDE) for pair in raw]
    want = expected(made, [x._replace(images=x.images[:, :, ::-1]) for x in loaded])
    plain = expected(made, loaded)
    found = stored(mirrored)
    for pair, own, unlike in zip(raw, want, plain, strict=True):
        got = found[pair.id][1]
        own, unlike = (x[::-1] if pair.preference < 0.5 else x for x in (own, unlike))
        np.testing.assert_allclose(got.flipped, own, rtol=1e-5, atol=1e-5)
        assert np.abs(got.flipped - unlike).max(axis=(1, 2, 3)).min() > 1e-2
        mirror = got.flip()
        np.testing.assert_array_equal(mirror.moments, got.flipped)
        np.testing.assert_array_equal(mirror.sizes, flip_sizes(got.sizes))
        np.testing.assert_array_equal(mirror.flip().moments, got.moments)
        assert got.sizes[0, 3] + mirror.sizes[0, 3] == 46 - SIDE


def test_what_was_not_stored_is_not_flipped(whole):
    pair = records.open_pairs(whole).split("train")[0]
    with pytest.raises(ValueError, match="no flipped variant: encode with flip"):
        pair.flip()


@pytest.mark.long
def test_source_and_mask_are_flipped_too(tmp_path):
    debug.write_tiny_pipeline(epath.Path(tmp_path / "model"), SD_INPAINT)
    rows = debug.synthetic_pairs(4, given=SD_INPAINT.given_fields)
    sources.write_pick_a_pic(tmp_path / "pairs.parquet", rows)
    made = f"pickapic:{tmp_path / 'pairs.parquet'}", str(tmp_path / "model")
    pairs = encode(made, tmp_path / "out", flip=True)
    for _, pair in stored(pairs).values():
        mask, mirror = pair.image[..., 0], pair.flip().image[..., 0]
        assert 0 < mask.mean() < 1
        # Nearest-pixel masks begin at a cell's first pixel: mirrored, at its last.
        assert np.abs(mirror - mask[:, ::-1]).sum(axis=1).max() <= 2
        assert np.abs(mirror - mask).sum() > 0


# --- bad records ----------------------------------------------------------------


@pytest.mark.long
def test_bad_records_are_counted_and_left_out(made, tmp_path):
    rows = make_rows(30, 5)
    rows[3]["jpg_0"] = rows[3]["jpg_0"][:80]
    rows[11]["jpg_1"] = b"no image"
    sources.write_pick_a_pic(tmp_path / "pairs.parquet", rows)
    source = f"pickapic:{tmp_path / 'pairs.parquet'}"
    pairs = encode((source, made[1]), tmp_path / "out", max_bad=0.1)
    assert sum(pairs.meta.skipped.values()) == 2
    found = stored(pairs)
    assert len(found) == 28
    assert not {"pairs.parquet:3", "pairs.parquet:11"} & set(found)
    for row in rows[15:]:
        row["jpg_0"] = b"no image"
    sources.write_pick_a_pic(tmp_path / "bad.parquet", rows)
    with pytest.raises(TooManyBadError):
        encode((f"pickapic:{tmp_path / 'bad.parquet'}", made[1]), tmp_path / "bad")
    assert not list((tmp_path / "bad").glob("encoded*"))
    assert not list((tmp_path / "bad").glob(".*"))


def test_an_odd_image_and_text_cost_their_rows_alone(made, tmp_path):
    rows = raw_sources.good_rows()
    rows[1]["image_1"] = png(np.zeros((1, 100_000), np.uint8))  # resized, it would take 10 GB
    rows[3]["prompt"] = "half of \ud83d"
    source = raw_sources.write("webdataset", tmp_path, rows)
    meta = encode((source, made[1]), tmp_path / "out").meta
    assert meta.skipped == {"absurd shape": 1, "not UTF-8": 1}
    assert meta.counts["train"] + meta.counts["validation"] == len(rows) - 2


def test_another_choice_of_files_does_not_resume(made, tmp_path, monkeypatch):
    monkeypatch.setattr(encode_pairs, "write_pairs", _stop)
    for allow_outside, error in ((False, KeyboardInterrupt), (True, ValueError)):
        with pytest.raises(error):
            encode(made, tmp_path / "out", allow_outside=allow_outside)


def _stop(*_):
    raise KeyboardInterrupt


def test_prompts_that_change_are_refused(made, tmp_path, monkeypatch):
    monkeypatch.setattr(
        encode_parts, "load_table", lambda work: encode_parts.Table({"": 0}, frozenset())
    )
    with pytest.raises(
        ValueError, match="a prompt that was not there when the prompts were listed"
    ):
        encode(made, tmp_path / "out")
