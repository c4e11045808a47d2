"""Tests for dmpo_jax/data/tfds/, sources/built.py, splits.py and counts.py."""

import collections
import filecmp
import importlib.util
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from dmpo_jax import locks
from dmpo_jax.data import sources
from dmpo_jax.data.sources import counts, splits
from dmpo_jax.data.sources.bad_records import TooManyBadError, decode_pair
from dmpo_jax.data.tfds import PairsConfig, PreferencePairs, build
from dmpo_jax.errors import UserError
from tests.support.raw_pairs import read

ROOT = pathlib.Path(__file__).parents[2]
BAD = 3  # undecodable rows of `write`: a handful


def picture(i, size=(6, 4), kind="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", size, (i % 256, i // 256, 7)).save(buffer, kind)
    return buffer.getvalue()


def rows(start, count):
    for i in range(start, start + count):
        sizes = [(6, 4), (4, 6)] if i % 3 else [(8, 8), (8, 8)]
        yield {
            "caption": f"ein Bär {i // 4}",
            "jpg_0": picture(2 * i, sizes[0]),
            "jpg_1": picture(2 * i + 1, sizes[1], "JPEG"),
            "label_0": (1.0, 0.5, 0.0, 0.25)[i % 4],
            "jpg_source": picture(i) if i % 2 else None,
        }


def write(folder, files=4, each=30):
    """Pick-a-Pic files; the last has bad rows too. Returns the pairs that are good."""
    for k in range(files):
        bad = []
        if k == files - 1:
            bad = [{**row, "jpg_0": b"no image"} for row in rows(9000, BAD)]
            bad += [{**row, "has_label": False} for row in rows(9100, 2)]
        sources.write_pick_a_pic(folder / f"{k}.parquet", [*rows(k * each, each), *bad])
    found = sources.open_source(f"pickapic:{folder}")
    return [p for p in read(found) if not isinstance(decode_pair(p), sources.Skipped)]


def make(folder, data_dir, **changes):
    settings = {"source": f"pickapic:{folder}", "validation_fraction": 0.3, "shard_pairs": 40}
    config = PairsConfig(name="mine", **{**settings, **changes})
    return PreferencePairs(data_dir=os.fspath(data_dir), config=config)


def built(folder, data_dir, options=None, **changes):
    builder = make(folder, data_dir, **changes)
    config = tfds.download.DownloadConfig(beam_options=options)
    builder.download_and_prepare(download_config=config)
    return builder


def files_of(builder):
    return sorted(p.name for p in builder.data_path.iterdir())


def assert_same_files(a, b):
    """Two builds hold the same, byte for byte."""
    assert files_of(a) == files_of(b)
    _, different, unread = filecmp.cmpfiles(a.data_dir, b.data_dir, files_of(a), shallow=False)
    assert not different
    assert not unread


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """(folder of the source, its good pairs, its build)."""
    folder = tmp_path_factory.mktemp("source")
    pairs = write(folder)
    return folder, pairs, built(folder, tmp_path_factory.mktemp("build"))


def test_what_is_built_is_the_source(example):
    _, pairs, builder = example
    source = sources.open_source(f"tfds:{builder.data_dir}")
    wanted = [
        pair
        for held_out in (False, True)
        for pair in pairs
        if splits.is_held_out(pair.prompt, 0.3) == held_out
    ]
    assert read(source) == wanted  # every field, in order
    assert len(source) == len(wanted) == 120
    assert source.given == {"source", "mask"}
    assert [p for unit in source.units() for p in source.prompts(unit)] == [
        pair.prompt for pair in wanted
    ]
    shards = builder.info.splits["train"].shard_lengths
    assert len(shards) == 4
    assert sum(shards) == builder.info.splits["train"].num_examples
    record = tfds.builder_from_directory(builder.data_dir).as_data_source("train")[0]
    assert record["image_0"] == wanted[0].images[0]
    assert record["mask"] is None


def test_no_prompt_is_on_both_sides(example):
    _, _, builder = example
    prompts = {
        split: {record["prompt"] for record in builder.as_data_source(split)}
        for split in ("train", "validation")
    }
    assert all(prompts.values())
    assert not prompts["train"] & prompts["validation"]


def test_statistics(example):
    folder, pairs, builder = example
    found = json.loads((builder.data_path / "statistics.json").read_text())
    both = found["splits"].values()
    assert found["skipped"] == {"no label": 2, "undecodable image": BAD}
    assert found["source"] == f"pickapic:{folder}"
    assert sum(s["pairs"] for s in both) == len(pairs)
    assert sum(s["ties"] for s in both) == sum(p.preference == 0.5 for p in pairs) > 0
    assert sum(s["prompts"] for s in both) == len({p.prompt for p in pairs})
    sizes = sum((collections.Counter(s["resolutions"]) for s in both), collections.Counter())
    assert sizes == {"8x8": 80, "6x4": 80, "4x6": 80}
    labels = sum((collections.Counter(s["preferences"]) for s in both), collections.Counter())
    assert labels == {"1.00": 30, "0.50": 30, "0.00": 30, "0.25": 30}


def test_a_build_can_be_built_again(example, tmp_path):
    _, _, builder = example
    again = built("", tmp_path, source=f"tfds:{builder.data_dir}", ties="drop")
    kept = read(sources.open_source(f"tfds:{again.data_dir}"))
    assert kept == read(sources.open_source(f"tfds:{builder.data_dir}", ties="drop"))
    assert len(kept) == 90
    found = json.loads((again.data_path / "statistics.json").read_text())
    assert found["skipped"] == {"tie": 30}


def test_two_builds_do_not_run_at_once(example, tmp_path, monkeypatch):
    folder, _, builder = example
    left = tmp_path / "preference_pairs" / "mine" / "incomplete.ABCDEF_1.0.0"
    left.mkdir(parents=True)
    (left / "shard").write_bytes(b"of a build that was killed")
    refused = []

    def write_shard(job, shard, write=build.write_shard):
        write(job, shard)
        with monkeypatch.context() as patch:  # as another process has it
            patch.setattr(locks, "_held", {})
            with pytest.raises(ValueError, match=r"preference_pairs/mine is in use by tfds build"):
                built(folder, tmp_path)
        refused.append(shard)

    monkeypatch.setattr(build, "write_shard", write_shard)
    assert_same_files(builder, built(folder, tmp_path))
    assert refused
    assert [p.name for p in left.parent.iterdir()] == ["1.0.0"]
    monkeypatch.setattr(locks, "hold", None)
    built(folder, tmp_path)  # it is built: nothing is written


def test_shards_without_a_pair_have_no_file(tmp_path):
    write(tmp_path / "raw", files=3, each=4)  # a prompt a file
    held = [splits.is_held_out(f"ein Bär {i}", 0.4) for i in range(3)]
    assert 0 < sum(held) < 3
    builder = built(tmp_path / "raw", tmp_path / "out", validation_fraction=0.4, shard_pairs=1)
    lengths = builder.info.splits["validation"].shard_lengths
    assert lengths == [4 * x for x in held]
    assert len(builder.as_data_source("validation")) == 4 * sum(held)
    assert len(builder.as_data_source("train")) == 12 - 4 * sum(held)
    assert len(list((tmp_path / "out").rglob("*validation*"))) == sum(held)


def test_too_many_bad_rows_leave_nothing(tmp_path):
    write(tmp_path / "raw")
    path = tmp_path / "raw" / "00.parquet"  # in another shard than the other bad rows
    sources.write_pick_a_pic(path, [{**row, "jpg_1": b"no"} for row in rows(8000, 2)])
    builder = make(tmp_path / "raw", tmp_path / "out")
    with pytest.raises(TooManyBadError, match="5 undecodable image"):
        builder.download_and_prepare()
    assert not builder.data_path.exists()
    built(tmp_path / "raw", tmp_path / "out", max_bad=0.05)


def test_bad_rows_of_all_shards_add_up(tmp_path, monkeypatch):
    for k in range(5):  # two bad rows in each
        bad = [{**row, "jpg_1": b"no"} for row in rows(8000, 2)]
        sources.write_pick_a_pic(tmp_path / "raw" / f"{k}.parquet", [*rows(20 * k, 20), *bad])
    written = []

    def write_shard(job, shard, write=build.write_shard):
        write(job, shard)
        written.append((job, shard))

    monkeypatch.setattr(build, "write_shard", write_shard)
    with pytest.raises(TooManyBadError, match="4 of 110 pairs are bad"):
        built(tmp_path / "raw", tmp_path / "out", shard_pairs=20)
    assert len(written) == 2  # one process stops as soon as it can
    # What Beam's workers report is added up at the end.
    job = written[0][0]._replace(folder=str(tmp_path))
    reports = []
    for _, shard in list(written):
        write_shard(job, shard)
        reports.append(build.take_report(job, shard))
    with pytest.raises(TooManyBadError, match="4 of 110 pairs are bad"):
        build.summarize(job, reports)


def test_wrong_wishes_are_refused(tmp_path):
    write(tmp_path / "raw", files=1)
    with pytest.raises(ValueError, match="holds out all: lower it"):
        built(tmp_path / "raw", tmp_path / "out", validation_fraction=1)
    with pytest.raises(ValueError, match=r"as array_record only, but got 'tfrecord'"):
        PreferencePairs(data_dir=os.fspath(tmp_path), config="pickapic", file_format="tfrecord")
    builder = make(tmp_path / "raw", tmp_path / "out")
    with pytest.raises(ValueError, match="num_shards have no meaning"):
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=3))
    with pytest.raises(ValueError, match=r"fraction must lie in \[0, 1\], but got 1.5"):
        built(tmp_path / "raw", tmp_path / "out", validation_fraction=1.5)
    with pytest.raises(FileNotFoundError, match="no TFDS dataset in"):
        sources.open_source(f"tfds:{tmp_path}")


def test_other_datasets_are_refused(example, tmp_path):
    _, _, builder = example
    other = tmp_path / "other"
    shutil.copytree(builder.data_dir, other)
    features = json.loads((other / "features.json").read_text())
    del features["featuresDict"]["features"]["image_1"]
    (other / "features.json").write_text(json.dumps(features))
    with pytest.raises(ValueError, match=r"needs the features .* lacks \['image_1'\] and has"):
        sources.open_source(f"tfds:{other}")
    with pytest.raises(FileNotFoundError, match=f"such as {builder.data_dir}"):
        sources.open_source(f"tfds:{builder.data_path.parent.parent}")


def test_plan_keeps_units_whole_and_in_order():
    units = [sources.Unit(str(i), "f", 0, n) for i, n in enumerate([3, 3, 3, 9, 1, 1])]
    planned = build.plan_shards(units, 6)
    assert [[unit.name for unit in part] for part in planned] == [
        ["0", "1"],
        ["2"],
        ["3"],
        ["4", "5"],
    ]
    with pytest.raises(ValueError, match="got 0 and 6"):
        build.plan_shards([], 6)


def test_held_out_prompts():
    prompts = [f"prompt {i}" for i in range(4000)]
    for fraction in (0.01, 0.2):
        share = np.mean([splits.is_held_out(p, fraction) for p in prompts])
        assert share == pytest.approx(fraction, rel=0.2)
    assert not any(splits.is_held_out(p, 0) for p in prompts)
    assert all(splits.is_held_out(p, 1) for p in prompts)
    assert not splits.is_held_out("", 0.1)  # it is in most data sets, and is no prompt


def test_counts_add_up():
    parts = [counts.PairCounts() for _ in range(3)]
    for i in range(30):
        for part in (parts[2], parts[i % 2]):
            part.add(f"prompt {i % 7}", i % 3 / 2, [(4, 6), (i % 2 + 1, 6)])
    merged = counts.PairCounts.from_json(json.loads(json.dumps(parts[0].to_json())))
    merged.merge(parts[1])
    assert merged.summary() == parts[2].summary()
    assert merged.summary()["prompts"] == 7


def test_the_command_needs_no_tensorflow(example, tmp_path):
    folder, _, builder = example
    code = (
        "import runpy, sys\n"
        "try: runpy.run_module('dmpo_jax.data.tfds', run_name='__main__', alter_sys=True)\n"
        "finally: print('tensorflow' in sys.modules)"
    )
    config = {"name": "mine", "source": f"pickapic:{folder}", "validation_fraction": 0.3}
    flags = [f"--config={json.dumps({**config, 'shard_pairs': 40})}", f"--data_dir={tmp_path}"]
    run = subprocess.run(
        [sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "False"
    # In another process: the bytes do not depend on its hash seed.
    assert_same_files(builder, make(folder, tmp_path))


@pytest.mark.skipif(not importlib.util.find_spec("apache_beam"), reason="needs '.[beam]'")
@pytest.mark.parametrize("mode", ["multi_processing", "multi_threading"])
def test_beam_with_two_workers_builds_the_same(example, tmp_path, mode):
    """In a process of its own: Beam's workers fork and leave warnings behind."""
    folder, _, builder = example
    config = {"name": "mine", "source": f"pickapic:{folder}", "validation_fraction": 0.3}
    run = subprocess.run(
        [
            *(sys.executable, "-m", "dmpo_jax.data.tfds"),
            f"--config={json.dumps({**config, 'shard_pairs': 40})}",
            f"--data_dir={tmp_path}",
            "--beam_pipeline_options=runner=DirectRunner,direct_num_workers=2,"
            f"direct_running_mode={mode}",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert_same_files(builder, make(folder, tmp_path))


# --- builds from elsewhere --------------------------------------------------------------------


def copy_of(builder, folder, monkeypatch):
    """A copy of a build beside a module that Python would find, as with `python -m`."""
    copy = folder / "download"
    shutil.copytree(builder.data_dir, copy)
    (copy / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()")
    monkeypatch.syspath_prepend(str(folder))
    return copy


@pytest.mark.parametrize("of", ["nested", "legacy"])
def test_no_code_of_the_folder_is_imported(of, example, tmp_path, monkeypatch):
    copy = copy_of(example[2], tmp_path, monkeypatch)
    text = (copy / "features.json").read_text()
    if of == "nested":
        text = text.replace("tensorflow_datasets.core.features.text_feature", "download.evil")
    else:
        text = json.dumps({"type": "download.evil.FeaturesDict", "content": {"features": {}}})
    (copy / "features.json").write_text(text)
    with pytest.raises(UserError, match=r"features\.json is refused: .* is 'download\.evil\."):
        sources.open_source(f"tfds:{copy}")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../../elsewhere/x"},
        {"fileFormat": "array_record/../../elsewhere"},
        {"splits": {"filepathTemplate": "../elsewhere/{DATASET}-{SPLIT}-{SHARD_X_OF_Y}"}},
        {"splits": {"filepathTemplate": "/elsewhere/{DATASET}-{SPLIT}-{SHARD_X_OF_Y}"}},
        {"splits": {"name": "../train"}},
    ],
)
def test_no_file_elsewhere_is_read(change, example, tmp_path, monkeypatch):
    copy = copy_of(example[2], tmp_path, monkeypatch)
    info = json.loads((copy / "dataset_info.json").read_text())
    for split in info["splits"]:
        split |= change.get("splits", {})
    info |= {name: value for name, value in change.items() if name != "splits"}
    (copy / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"dataset_info\.json is refused: .*their own folder"):
        sources.open_source(f"tfds:{copy}")
