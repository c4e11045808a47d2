"""Tests for dmpo_jax/data/sources/web_dataset.py: tar shards."""

import io
import json
import tarfile
import warnings

import pytest

from dmpo_jax.data import sources
from dmpo_jax.data.sources import rows, web_dataset
from tests.support.raw_pairs import check_units, image, make_bucket, read, skipped


def write(file, samples):
    """Samples {"__key__": ..., WHAT: bytes} as a shard, in the order of their keys."""
    with tarfile.open(file, "w") as tar:
        for sample in samples:
            for what, data in sample.items():
                if what != "__key__":
                    info = tarfile.TarInfo(f"{sample['__key__']}.{what}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return file


def sample(i, **about):
    about = {"prompt": f"prompt {i}", "label_0": (i % 3) / 2, **about}
    images = {"jpg_0": image(2 * i, "JPEG"), "jpg_1": image(2 * i + 1, "JPEG")}
    return {"__key__": f"{i:06d}", **images, "json": json.dumps(about).encode()}


def test_shards_are_read_as_webdataset_reads_them(tmp_path):
    with warnings.catch_warnings():  # what it imports warns
        warnings.simplefilter("ignore")
        import webdataset

        for shard, start in (("a", 0), ("b", 30)):
            with webdataset.TarWriter(str(tmp_path / f"{shard}.tar")) as writer:
                for i in range(start, start + 30):
                    writer.write(sample(i))
        theirs = list(
            webdataset.WebDataset([str(tmp_path / f"{s}.tar") for s in "ab"], shardshuffle=False)
        )
    source = sources.open_source(f"webdataset:{tmp_path}")
    assert len(source) == 60
    assert source.given == frozenset()
    ours = check_units(source, 60)
    for i, (pair, want) in enumerate(zip(ours, theirs, strict=True)):
        shard = f"{'ab'[i // 30]}.tar"
        assert pair.id == f"{shard}:{want['__key__']}"
        assert pair.images == (want["jpg_0"], want["jpg_1"])
        assert pair.prompt == json.loads(want["json"])["prompt"] == f"prompt {i}"
        assert pair.preference == (i % 3) / 2
    dropping = sources.open_source(f"webdataset:{tmp_path}/a*.tar", ties="drop")
    assert len(read(dropping)) == 20
    assert skipped(dropping) == {"tie": 10}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("jpg_0", "jpg_1"),
        ("0.jpg", "1.jpg"),
        ("image_0.png", "image_1.png"),
        ("PNG_0", "webp_1"),
        ("image.00.jpeg", "image.01.jpeg"),
    ],
)
def test_names_of_images(first, second, tmp_path):
    about = json.dumps({"votes_0": 3, "votes_1": 1, "source": "a text", "images": 4}).encode()
    row = {"__key__": "dir/a", second: image(1), first: image(0), "txt": b" a cat\n", "json": about}
    write(tmp_path / "a.tar", [row, row | {"__key__": "dir/b"}])
    pair, other = check_units(sources.open_source(f"webdataset:{tmp_path}/a.tar"), 2)
    assert pair == ("a.tar:dir/a", "a cat", (image(0), image(1)), 0.75, None, None)
    assert other.id == "a.tar:dir/b"


def test_chosen_and_rejected_need_no_json_and_edits_have_a_source(tmp_path):
    row = {"chosen.png": image(0), "rejected.png": image(1), "jpg_source": image(2)}
    row |= {"mask.png": image(3), "caption": b"a cat", "mp3": b"", "__key__": "a"}
    write(tmp_path / "a.tar", [row])
    source = sources.open_source(f"webdataset:{tmp_path}/a.tar")
    assert source.given == {"source", "mask"}
    (pair,) = check_units(source, 1)
    assert pair[1:] == ("a cat", (image(0), image(1)), 1.0, image(2), image(3))


def test_ranked_lists(tmp_path):
    about = json.dumps({"prompt": "a", "ranks": [2, 1, 2]}).encode()
    row = {f"jpg_{i}": image(i) for i in (2, 0, 1)}
    write(tmp_path / "a.tar", [{"__key__": "a", **row, "json": about}])
    source = sources.open_source(f"webdataset:{tmp_path}/a.tar")
    pairs = check_units(source, 1)
    assert len(source) == 3
    assert [(p.id[-3:], p.preference) for p in pairs] == [("0-1", 0), ("0-2", 0.5), ("1-2", 1)]
    assert [p.images for p in pairs] == [(image(i), image(j)) for i, j in ((0, 1), (0, 2), (1, 2))]


def test_large_shards_are_cut_and_prompts_read_no_image(tmp_path, monkeypatch):
    row = {"png_0": b"0", "png_1": b"1"}
    about = [json.dumps({"prompt": str(i), "label_0": 1}).encode() for i in range(1001)]
    samples = [{"__key__": str(i), **row, "json": a} for i, a in enumerate(about)]
    write(tmp_path / "a.tar", samples)
    source = sources.open_source(f"webdataset:{tmp_path}")
    assert [(u.start, u.stop) for u in source.units()] == [(0, 1000), (1000, 1001)]
    assert [p.prompt for p in check_units(source, 1001)] == [str(i) for i in range(1001)]
    read = []
    original = web_dataset._extract
    monkeypatch.setattr(
        web_dataset, "_extract", lambda tar, info: (read.append(info.name), original(tar, info))[1]
    )
    assert list(source.prompts(source.units()[1])) == ["1000"]
    assert read == ["1000.json"]


class Opened:
    """A tar file, and the headers that are read from it."""

    def __init__(self, monkeypatch):
        self.headers, original = 0, tarfile.TarInfo.fromtarfile.__func__

        def counted(kind, tar):
            self.headers += 1
            return original(kind, tar)

        monkeypatch.setattr(tarfile.TarInfo, "fromtarfile", classmethod(counted))


@pytest.mark.long
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_unit_reads_no_header_before_it(kind, known, tmp_path, monkeypatch):
    """Names of 150 letters have headers of their own."""
    monkeypatch.setattr(web_dataset, "UNIT_PAIRS", 10)
    monkeypatch.setattr(tarfile.TarFile, "format", kind)
    samples = [sample(i) for i in range(200)]
    for one in samples:
        one["__key__"] = "k" * 150 + one["__key__"]
    write(tmp_path / "a.tar", samples)
    source = sources.open_source(f"webdataset:{tmp_path}")
    units = source.units()
    assert len(units) == 20
    whole = check_units(source, 200)
    if not known:  # as a worker that was only told its units
        source = sources.open_source(f"webdataset:{tmp_path}")
        list(source.read(units[3]))
    opened = Opened(monkeypatch)
    assert [pair for unit in units for pair in source.read(unit)] == whole
    assert opened.headers <= 2 * 3 * (200 + 2 * 20)  # of a name and of a file, thrice a sample


def test_bad_samples_are_skipped_by_reason(tmp_path, monkeypatch):
    bad = [
        ("no image", {"jpg_0": b""}),
        ("not JSON", {"json": b"{"}),
        ("not JSON", {"json": b"[]"}),
        ("not UTF-8", {"json": b'{"prompt": "\xff"}'}),
        ("bad label", {"json": b'{"prompt": "a", "label_0": 2}'}),
        ("bad label", {"json": b'{"prompt": "a", "label_0": NaN}'}),
        ("no label", {"json": b'{"prompt": "a"}'}),
        ("no prompt", {"json": b'{"label_0": 1}'}),
        ("not UTF-8", {"json": b'{"label_0": 1}', "txt": b"\xff"}),
        ("twice the same", {"png_0": image(7)}),
        ("uneven lists", {"jpg_100": image(7)}),
        ("absurd size", {"jpg_0": b"x" * 2000}),
    ]
    monkeypatch.setattr(rows, "MAX_BYTES", 1999)
    samples = [sample(0), *(sample(1) | change for _, change in bad), sample(2)]
    del samples[1]["jpg_1"]
    for i, one in enumerate(samples):
        one["__key__"] = str(i)
    write(tmp_path / "a.tar", samples)
    first, *skipped, last = check_units(sources.open_source(f"webdataset:{tmp_path}"), len(samples))
    assert (first.prompt, last.prompt) == ("prompt 0", "prompt 2")
    assert [s.reason for s in skipped] == [reason for reason, _ in bad]
    assert [s.bad for s in skipped] == [reason != "no label" for reason, _ in bad]


def damage(data, kind):
    """A shard of three samples, damaged."""
    second = data.index(b"000002.jpg_0")
    if kind == "header":
        return data[: second + 20] + b"?" + data[second + 21 :]
    if kind == "cut between members":
        return data[:second]
    if kind == "cut inside":
        return data[: second + 700]
    if kind == "joined":
        return data + data
    raise AssertionError(kind)


@pytest.mark.parametrize("kind", ["header", "cut between members", "cut inside", "joined"])
def test_a_damaged_shard_is_refused_before_work(kind, tmp_path):
    """tarfile by itself takes the first two and the last for a shorter shard, without a word."""
    file = write(tmp_path / "a.tar", [sample(i) for i in range(3)])
    source = sources.open_source(f"webdataset:{file}")
    (unit,) = source.units()
    file.write_bytes(damage(file.read_bytes(), kind))
    broken = sources.open_source(f"webdataset:{file}")
    for use in (broken.units, broken.__len__):
        with pytest.raises(ValueError, match=r"a\.tar is not a complete tar file"):
            use()
    if kind != "joined":  # by another process, after the damage
        with pytest.raises(ValueError, match=r"a\.tar"):
            list(source.read(unit))


def test_a_key_apart_is_refused(tmp_path):
    write(tmp_path / "a.tar", [sample(0), sample(1), sample(0)])
    with pytest.raises(ValueError, match="members of 000000 should stand together"):
        sources.open_source(f"webdataset:{tmp_path}").units()


def test_wrong_schema_names_found_and_expected(tmp_path):
    write(tmp_path / "a.tar", [{"__key__": "a", "jpg": image(0), "txt": b"a"}])
    with pytest.raises(ValueError, match=r"sample a holds no pairs .*image_0.*has \['prompt'\]"):
        sources.open_source(f"webdataset:{tmp_path}")
    write(tmp_path / "a.tar", [{"__key__": "a", "jpg_0": image(0), "json": b"{"}])
    with pytest.raises(ValueError, match="sample a: not JSON"):
        sources.open_source(f"webdataset:{tmp_path}")
    write(tmp_path / "a.tar", [])
    with pytest.raises(ValueError, match="hold no sample"):
        sources.open_source(f"webdataset:{tmp_path}")
    (tmp_path / "a.tar").write_bytes(b"not a tar file" * 100)
    with pytest.raises(ValueError, match="not a complete tar file"):
        sources.open_source(f"webdataset:{tmp_path}")
    with pytest.raises(FileNotFoundError, match="no tar file at"):
        sources.open_source(f"webdataset:{tmp_path}/none")


def test_object_storage(tmp_path, monkeypatch):
    """A bucket in memory."""
    store = make_bucket(monkeypatch)
    data = write(tmp_path / "a.tar", [sample(i) for i in range(3)]).read_bytes()
    for name in "ab":
        store.pipe(f"s3://shards/{name}.tar", data)
    for spec in ("s3://shards", "s3://shards/*.tar"):
        pairs = check_units(sources.open_source(f"webdataset:{spec}"), 6)
        assert [pair.id for pair in pairs[::3]] == ["a.tar:000000", "b.tar:000000"]
        assert pairs[0].images == (sample(0)["jpg_0"], sample(0)["jpg_1"])
