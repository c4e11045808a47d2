"""Tests for dmpo_jax/data/encoded/records.py."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath

from dmpo_jax import storage
from dmpo_jax.data.batches.pipeline import make_batches
from dmpo_jax.data.encoded import prompt_store, records
from dmpo_jax.data.encoded.pair import chosen_first
from dmpo_jax.errors import UserError
from tests.support.encoded import META, make_imaged, make_pair, make_prompts, write

ROOT = pathlib.Path(__file__).parents[2]


def assert_same(a, b):
    assert a._fields == b._fields
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)
        assert getattr(x, "dtype", None) == getattr(y, "dtype", None)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("pooled", [True, False])
def test_round_trip(tmp_path, dtype, pooled):
    train = [make_pair(i, dtype=dtype) for i in range(40)]
    prompts = list(make_prompts(pooled=pooled, dtype=dtype))
    splits = {"validation": train[:3], "train": iter(train)}
    write(tmp_path / "out", splits, iter(prompts), pairs_per_shard=10)
    pairs = records.open_pairs(str(tmp_path / "out"))
    assert len(pairs.split("train")) == 40
    assert len(pairs.split("validation")) == 3
    assert len(list((tmp_path / "out").glob("*train*"))) > 1
    for i in (39, 0, 17):
        assert_same(pairs.split("train")[i], train[i])
    assert len(pairs.prompts) == 3
    for got, want in zip(pairs.prompts, prompts, strict=True):
        assert_same(got, want)
    assert pairs.meta.model == "tiny-sd"
    assert pairs.meta.counts == {"train": 40, "validation": 3, "prompts": 3}
    assert pairs.meta.arrays.moments == ((2, 4, 6, 8), np.dtype(dtype).name)
    with pytest.raises(IndexError):
        pairs.split("train")[40]
    with pytest.raises(ValueError, match=r"no split 'test', only \['train', 'validation'\]"):
        pairs.split("test")


IMAGED = {**META, "image_kind": "inpaint"}


def test_images_round_trip(tmp_path):
    train = [make_imaged(0), make_imaged(1, preference=0.25)]
    write(tmp_path, {"train": train, "validation": train[:1]}, meta=IMAGED)
    pairs = records.open_pairs(tmp_path)
    assert_same(pairs.split("train")[0], train[0])
    np.testing.assert_array_equal(pairs.split("train")[1].image, train[1].image)
    assert pairs.meta.image_kind == "inpaint"
    assert pairs.meta.arrays.image == ((4, 6, 5), "float16")


def test_folders_of_format_2_open(tmp_path):
    write(tmp_path)
    meta = json.loads((tmp_path / records.MARKER).read_text())
    del meta["image_kind"], meta["shapes"]["image"]
    for name in ("pack", "told_sizes", "content", "hashes", "source_files", "digest"):
        del meta[name]
    meta["format"] = 2
    (tmp_path / records.MARKER).write_text(json.dumps(meta))
    pairs = records.open_pairs(tmp_path)
    assert pairs.meta.image_kind == ""
    assert pairs.meta.arrays.image is None
    assert_same(pairs.split("train")[3], make_pair(3))
    assert pairs.split("train")[3].image is None


BAD_IMAGES = {
    "absent": (None, IMAGED, "should have an image, .* got none"),
    "unnamed": (make_imaged(1).image, META, "got no image_kind in meta"),
    "unlike the first": (np.zeros((4, 6, 4), np.float16), IMAGED, r"image should .*\[4, 6, 4\]"),
    "nan": (np.full((4, 6, 5), np.nan, np.float16), IMAGED, "image is not finite"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_image_refusals_name_the_record(tmp_path, name):
    image, meta, match = BAD_IMAGES[name]
    first = make_imaged(0) if meta is IMAGED else make_pair(0)
    with pytest.raises(ValueError, match=rf"pair 'pair-1'.*{match}"):
        write(tmp_path, {"train": [first, make_pair(1)._replace(image=image)]}, meta=meta)


@pytest.mark.parametrize("shape", [(4, 4, 5), (4, 6)])
def test_an_image_is_of_the_moments_size(tmp_path, shape):
    pair = make_pair(0)._replace(image=np.zeros(shape, np.float16))
    with pytest.raises(
        ValueError, match=r"pair 'pair-0'.*h and w as of the moments \[2, 4, 6, 8\]"
    ):
        write(tmp_path, {"train": [pair]}, meta=IMAGED)


def test_tfds_reads_it_alone(tmp_path):
    write(tmp_path)
    source = tfds.builder_from_directory(tmp_path).as_data_source("train")
    np.testing.assert_array_equal(source[7]["moments"], make_pair(7).moments)
    assert source[7]["id"] == b"pair-7"


def test_index_0_is_chosen(tmp_path):
    stored = [make_pair(0, 0.25), make_pair(1, 0.5), make_pair(2, 1.0)]
    write(tmp_path, {"train": stored})
    source = records.open_pairs(tmp_path).split("train")
    swapped = source[0]
    assert swapped.preference == 0.75
    np.testing.assert_array_equal(swapped.moments, stored[0].moments[::-1])
    np.testing.assert_array_equal(swapped.sizes, stored[0].sizes[::-1])
    assert_same(source[1], stored[1])  # a tie keeps its order
    assert_same(source[2], stored[2])
    assert_same(chosen_first(chosen_first(stored[0])), chosen_first(stored[0]))


NAN = np.full((2, 4, 6, 8), np.nan, np.float16)
BAD = {
    "nan": ({"moments": NAN}, "not finite"),
    "inf": ({"moments": NAN * 0 + np.float16(np.inf)}, "not finite"),
    "shape": ({"moments": np.zeros((2, 4, 4, 8), np.float16)}, r"got .*\[2, 4, 4, 8\]"),
    "dtype": ({"moments": np.zeros((2, 4, 6, 8), np.float32)}, "got .*float32"),
    "sizes": ({"sizes": np.zeros((2, 4), np.int32)}, r"integers \[2, 6\]"),
    "float sizes": ({"sizes": np.zeros((2, 6))}, r"integers \[2, 6\]"),
    "high": ({"preference": 1.01}, r"\[0, 1\], but got 1.01"),
    "low": ({"preference": -0.5}, "got -0.5"),
    "nan preference": ({"preference": float("nan")}, "got nan"),
    "prompt": ({"prompt": 3}, r"\[0, 3\), but got 3"),
}


@pytest.mark.parametrize("name", BAD)
def test_refusals_name_the_record(tmp_path, name):
    changes, match = BAD[name]
    rows = [make_pair(0), make_pair(1)._replace(**changes)]
    with pytest.raises(ValueError, match=rf"pair 'pair-1'.*{match}"):
        write(tmp_path, {"train": rows})
    with pytest.raises(ValueError, match="run encode again"):
        records.open_pairs(tmp_path)


@pytest.mark.parametrize("shape", [(3, 4, 6, 8), (2, 4, 6), (2, 4, 6, 7)])
def test_first_record_is_checked_too(tmp_path, shape):
    pair = make_pair(0)._replace(moments=np.zeros(shape, np.float32))
    with pytest.raises(ValueError, match=r"pair 'pair-0'.*\[2, h, w, 2C\]"):
        write(tmp_path, {"train": [pair]})


def test_prompt_refusals(tmp_path):
    good = list(make_prompts())
    with pytest.raises(ValueError, match="prompt 0 must be the empty prompt"):
        write(tmp_path, prompts=good[1:])
    with pytest.raises(ValueError, match=r"prompt 1 .*pooled"):
        write(tmp_path, prompts=[good[0], good[1]._replace(pooled=None)])
    with pytest.raises(ValueError, match="context is not finite"):
        write(tmp_path, prompts=[good[0]._replace(context=NAN[0, 0])])
    with pytest.raises(ValueError, match="got none"):
        write(tmp_path, prompts=[])


def test_argument_refusals(tmp_path):
    with pytest.raises(ValueError, match=r"\['scaling_factor'\] is missing"):
        write(tmp_path, meta={"model": "x"})
    with pytest.raises(ValueError, match=r"may not set \['counts'\]"):
        write(tmp_path, meta=META | {"counts": {}})


class KilledError(BaseException):
    pass


def killed_after(iterable, count):
    for i, item in enumerate(iterable):
        if i == count:
            raise KilledError
        yield item


@pytest.mark.parametrize("where", ["prompts 0", "prompts 2", "train 0", "train 33", "validation 1"])
def test_killed_write_does_not_look_whole(tmp_path, where):
    name, count = where.split()
    inputs = {
        "prompts": make_prompts(),
        "train": map(make_pair, range(40)),
        "validation": map(make_pair, range(5)),
    }
    inputs[name] = killed_after(inputs[name], int(count))
    with pytest.raises(KilledError):
        write(tmp_path, {k: inputs[k] for k in ("train", "validation")}, inputs["prompts"])
    with pytest.raises(ValueError, match="encoding did not finish: run encode again"):
        records.open_pairs(tmp_path)
    write(tmp_path)  # encode again: the leftovers do not matter
    assert len(records.open_pairs(tmp_path).split("train")) == 40
    with pytest.raises(ValueError, match="no split"):
        records.open_pairs(tmp_path).split("validation")


def test_marker_is_written_last(tmp_path, monkeypatch):
    kind = type(epath.Path(tmp_path))
    original = kind.write_bytes

    def write_bytes(self, *args, **kw):
        if records.MARKER in self.name:
            raise KilledError
        return original(self, *args, **kw)

    monkeypatch.setattr(kind, "write_bytes", write_bytes)
    with pytest.raises(KilledError):
        write(tmp_path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"encoding did not finish"):
        records.open_pairs(tmp_path)


def damage_marker(folder):
    text = (folder / records.MARKER).read_text()
    (folder / records.MARKER).write_text(text[: len(text) // 2])


def damage_shard(folder):
    shard = next(folder.glob("*train*"))
    os.truncate(shard, shard.stat().st_size - 1)


def damage_prompts(folder):
    (folder / prompt_store.shard_name(0)).unlink()


@pytest.mark.parametrize("damage", [damage_marker, damage_shard, damage_prompts])
def test_a_damaged_copy_is_not_whole(tmp_path, damage):
    write(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match="encoding did not finish"):
        records.open_pairs(tmp_path)


@pytest.mark.parametrize("num_threads", [0, 2])
@pytest.mark.parametrize("name", ["encoded_pairs-train", "prompts"])
def test_a_damaged_record_names_its_file(name, num_threads, tmp_path):
    """As training reads it. Sizes are right, so the folder opens."""
    write(tmp_path, pairs_per_shard=20)
    file = sorted(tmp_path.glob(f"{name}.array_record-*"))[-1]
    content = bytearray(file.read_bytes())
    last = max(i for i, byte in enumerate(content) if byte)
    content[last] ^= 1
    for i in range(last - 4000, last - 100):
        content[i] ^= 1
    file.write_bytes(content)
    batches = make_batches(
        records.open_pairs(tmp_path),
        "train",
        global_batch=40,
        rows=range(40),
        seed=0,
        num_threads=num_threads,
    )
    with pytest.raises(UserError, match=rf"{file}, record \d+, cannot be read: .*dmpo-jax verify"):
        next(batches)


def test_a_whole_folder_is_kept_and_other_files_too(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    write(tmp_path)
    with pytest.raises(ValueError, match="already holds encoded pairs"):
        write(tmp_path)
    assert len(records.open_pairs(tmp_path).split("train")) == 40
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_no_code_of_a_folder_is_imported(tmp_path, monkeypatch):
    write(tmp_path / "pairs")
    (tmp_path / "pairs" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "pairs" / "features.json"
    text = file.read_text()
    evil = text.replace("tensorflow_datasets.core.features.text_feature", "pairs.evil")
    file.write_text(evil.ljust(len(text)))  # a file of another size is told anyhow
    with pytest.raises(UserError, match=r"features\.json is refused: .* 'pairs\.evil\.Text'"):
        records.open_pairs(tmp_path / "pairs")
    assert not (tmp_path / "ran").exists()


def test_readable_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="run encode first"):
        records.open_pairs(tmp_path / "absent")
    write(tmp_path)
    meta = json.loads((tmp_path / records.MARKER).read_text())
    (tmp_path / records.MARKER).write_text(json.dumps(meta | {"format": 99}))
    with pytest.raises(ValueError, match="has format 99, but this version reads 2 and 3"):
        records.open_pairs(tmp_path)
    with pytest.raises(ValueError, match="already holds"):
        write(tmp_path)


def test_remote_folders_are_written_and_read_through_local_copies(tmp_path, monkeypatch):
    bucket = tmp_path / "bucket"
    monkeypatch.setattr(storage, "is_remote", lambda path: "bucket" in epath.Path(path).parts)
    monkeypatch.setattr(storage.tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    write(bucket)
    assert not list((tmp_path / "tmp").iterdir())
    assert_same(records.open_pairs(bucket).split("train")[3], make_pair(3))
    (staged,) = (tmp_path / "tmp").iterdir()
    before = {p.name: p.stat().st_mtime_ns for p in staged.iterdir()}
    assert_same(records.open_pairs(bucket).prompts[2], list(make_prompts())[2])
    assert before == {p.name: p.stat().st_mtime_ns for p in staged.iterdir()}
    assert os.stat(staged).st_mode & 0o77 == 0
    shutil.rmtree(staged)


@pytest.mark.parametrize("hashed", [True, False])
def test_a_copy_of_other_pairs_at_the_same_place_is_not_reused(hashed, tmp_path, monkeypatch):
    """Their names and sizes are equal."""
    bucket, other = tmp_path / "bucket", tmp_path / "other"
    write(bucket)
    write(other, {"train": map(make_pair, reversed(range(40)))})
    monkeypatch.setattr(storage, "is_remote", lambda path: "bucket" in epath.Path(path).parts)
    monkeypatch.setattr(storage.tempfile, "tempdir", str(tmp_path))
    for folder in (bucket, other) if not hashed else ():
        meta = dataclasses.replace(records.load_meta(folder), hashes={})
        meta.save(folder)
    first = records.open_pairs(bucket)
    files = first.meta.files
    shutil.rmtree(bucket)
    other.rename(bucket)
    second = records.open_pairs(bucket)
    assert second.meta.files == files
    assert_same(first.split("train")[0], make_pair(0))
    assert_same(second.split("train")[0], make_pair(39))


def test_a_copy_that_another_user_made_is_refused(tmp_path, monkeypatch):
    bucket = tmp_path / "bucket"
    monkeypatch.setattr(storage, "is_remote", lambda path: "bucket" in epath.Path(path).parts)
    monkeypatch.setattr(storage.tempfile, "tempdir", str(tmp_path))
    write(bucket)
    records.open_pairs(bucket)
    (staged,) = tmp_path.glob("dmpo_jax-*")
    target = tmp_path / "theirs"
    staged.rename(target)
    staged.symlink_to(target)  # as another user could leave it
    with pytest.raises(ValueError, match=r"is another user's: set TMPDIR"):
        records.open_pairs(bucket)


def test_imports_neither_tensorflow_nor_torch(tmp_path):
    code = f"""
import sys
from dmpo_jax.data.batches import pipeline
from dmpo_jax.data.encoded import records
from dmpo_jax.data import sources
from tests.support import encoded
encoded.write({str(tmp_path)!r})
pairs = records.open_pairs({str(tmp_path)!r})
next(pipeline.make_batches(pairs, "train", global_batch=4, rows=[1], seed=0))
bad = [m for m in ("tensorflow", "torch") if m in sys.modules]
sys.exit(f"imported {{bad}}" if bad else 0)
"""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
