"""Tests for dmpo_jax/data/sources."""

import io
import struct
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dmpo_jax.data import sources
from tests.support import raw_pairs


def encoded(value=0, size=(6, 4), mode="RGB", kind="PNG"):
    buffer = io.BytesIO()
    Image.new(mode, size, value if mode != "RGB" else (value, 0, 255 - value)).save(buffer, kind)
    return buffer.getvalue()


def row(i, label=1.0, **changes):
    images = {"jpg_0": encoded(i % 256), "jpg_1": encoded(i % 256, (4, 4))}
    return {"caption": f"prompt {i}", "label_0": label, **images, **changes}


def test_round_trip(tmp_path):
    rows = [row(i, label=i % 3 / 2) for i in range(150)]  # more than two row groups
    rows[7] |= {"jpg_source": encoded(9), "mask": encoded(255, mode="L")}
    rows[8] |= {"jpg_source": encoded(9)}
    assert sources.write_pick_a_pic(tmp_path / "a" / "b.parquet", iter(rows)) == 150
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.parquet"]
    source = sources.open_source(f"pickapic:{tmp_path}/a/b.parquet")
    assert len(source) == 150
    for i, (got, want) in enumerate(zip(raw_pairs.read(source), rows, strict=True)):
        images = (want["jpg_0"], want["jpg_1"])
        wanted = (f"b.parquet:{i}", want["caption"], images, want["label_0"])
        assert got == (*wanted, want.get("jpg_source"), want.get("mask"))
    assert len({pair.id for pair in raw_pairs.read(source)}) == 150
    assert not raw_pairs.skipped(source)
    stored = pq.read_table(tmp_path / "a" / "b.parquet").to_pylist()
    assert stored[0]["best_image_uid"] == stored[0]["image_1_uid"]
    assert stored[1]["best_image_uid"] == "tie"
    assert stored[2]["best_image_uid"] == stored[2]["image_0_uid"]
    assert stored[2]["label_1"] == 0.0


def test_skips_are_counted_and_ties_kept(tmp_path):
    rows = [
        row(0, 0.5),
        row(1, has_label=False),
        row(2, are_different=False),
        row(3, jpg_1=row(3)["jpg_0"]),  # written as not different
        row(4, 0.0),
        row(5, jpg_0=b""),
    ]
    sources.write_pick_a_pic(tmp_path / "x.parquet", rows)
    source = sources.PickAPic(tmp_path / "x.parquet")
    for _ in range(2):
        assert [pair.preference for pair in raw_pairs.read(source)] == [0.5, 0.0]
        assert raw_pairs.skipped(source) == {"no label": 1, "equal images": 2, "no image": 1}
    assert len(source) == 6
    dropping = sources.open_source(f"pickapic:{tmp_path}", ties="drop")
    assert [pair.preference for pair in raw_pairs.read(dropping)] == [0.0]
    assert raw_pairs.skipped(dropping)["tie"] == 1


def test_folders_and_patterns(tmp_path):
    for name in ("train-1", "train-0", "validation-0"):
        sources.write_pick_a_pic(tmp_path / f"{name}.parquet", [row(1)])
    (tmp_path / "README.md").write_text("not parquet")
    assert len(sources.PickAPic(tmp_path)) == 3
    ids = [pair.id for pair in raw_pairs.read(sources.PickAPic(tmp_path / "train-*.parquet"))]
    assert ids == ["train-0.parquet:0", "train-1.parquet:0"]
    with pytest.raises(FileNotFoundError, match="no parquet file"):
        sources.PickAPic(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="no parquet file"):
        sources.PickAPic(tmp_path / "test-*.parquet")


def test_only_four_columns_are_required(tmp_path):
    pq.write_table(pa.Table.from_pylist([row(0, 0.25)]), tmp_path / "x.parquet")
    (pair,) = raw_pairs.read(sources.PickAPic(tmp_path))
    assert pair.preference == 0.25


def test_wrong_schema_names_found_and_expected(tmp_path):
    pq.write_table(pa.table({"caption": ["a"], "chosen": [b"x"]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"jpg_0.*lacks .*label_0.*has \['caption', 'chosen'\]"):
        sources.PickAPic(tmp_path)


def test_wrong_labels_are_skipped(tmp_path):
    wrong = [row(1, 2.0), row(2, float("nan")), row(3, -0.1), row(4, 1.0, label_1=1.0)]
    pq.write_table(pa.Table.from_pylist([row(0, label_1=None), *wrong]), tmp_path / "x.parquet")
    source = sources.PickAPic(tmp_path)
    (unit,) = source.units()
    pair, *skipped = source.read(unit)
    assert pair.id == "x.parquet:0"
    assert [(s.id, s.reason, s.bad) for s in skipped] == [
        (f"x.parquet:{i}", "bad label", True) for i in range(1, 5)
    ]
    assert "is 2.0" in skipped[0].detail
    assert list(source.prompts(unit)) == ["prompt 0"]


def test_reads_one_row_at_a_time(tmp_path, monkeypatch):
    table = pa.Table.from_pylist([row(i) for i in range(200)])
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=200)
    sizes = []
    original = pq.ParquetFile.iter_batches

    def iter_batches(self, *args, **kwargs):
        for batch in original(self, *args, **kwargs):
            sizes.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    source = sources.PickAPic(tmp_path)
    sizes.clear()
    assert next(source.read(source.units()[0])).prompt == "prompt 0"
    assert sizes == [1]


def test_a_killed_write_leaves_nothing(tmp_path):
    def rows():
        yield from (row(i) for i in range(100))
        raise KeyboardInterrupt

    sources.write_pick_a_pic(tmp_path / "x.parquet", [row(0)])
    with pytest.raises(KeyboardInterrupt):
        sources.write_pick_a_pic(tmp_path / "x.parquet", rows())
    assert [p.name for p in tmp_path.iterdir()] == ["x.parquet"]
    assert len(sources.PickAPic(tmp_path)) == 1  # what was there before
    data = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "x.parquet").write_bytes(data[:-10])
    with pytest.raises(ValueError, match="not a complete parquet file"):
        sources.PickAPic(tmp_path)


def test_write_refuses_wrong_rows(tmp_path):
    bad = row(0)
    del bad["caption"]
    for rows, match in (
        ([bad], r"lacks \['caption'\]"),
        ([row(0, extra=1)], r"has \['extra'\]"),
        ([row(0, 1.5)], r"\[0, 1\], but got 1.5"),
    ):
        with pytest.raises(ValueError, match=match):
            sources.write_pick_a_pic(tmp_path / "x.parquet", rows)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("spec", ["tar:/x", "/x", "pickapic:", ""])
def test_unknown_kinds_list_the_known(spec):
    with pytest.raises(ValueError, match=r"KIND one of \['hf', 'pickapic', 'table', 'tfds', 'web"):
        sources.open_source(spec)


@pytest.mark.parametrize(("mode", "kind"), [("RGB", "PNG"), ("L", "PNG"), ("RGB", "JPEG")])
def test_decode_image(mode, kind):
    image = sources.decode_image(encoded(128, mode=mode, kind=kind))
    assert image.shape == (4, 6, 3)
    assert image.dtype == np.uint8
    if kind == "PNG":
        assert (image == ([128, 0, 127] if mode == "RGB" else 128)).all()


@pytest.mark.parametrize(("mode", "kind"), [("1", "PNG"), ("L", "PNG"), ("L", "JPEG")])
def test_decode_mask(mode, kind):
    halves = Image.new("L", (16, 8))
    halves.paste(255, (8, 0, 16, 8))
    buffer = io.BytesIO()
    halves.convert(mode).save(buffer, kind)
    mask = sources.decode_mask(buffer.getvalue())
    assert mask.shape == (8, 16, 1)
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask[..., 0], np.arange(16)[None].repeat(8, 0) >= 8)
    for grey, value in ((127, 0), (128, 1)):
        assert (sources.decode_mask(encoded(grey, mode="L")) == value).all()


def bomb(width, height):
    """A PNG header of a few bytes that claims width x height pixels."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT\x35\xaf\x06\x1e"


@pytest.mark.parametrize("data", [b"", b"not an image", encoded()[:50], encoded(kind="JPEG")[:300]])
def test_undecodable_images_are_value_errors(data):
    with pytest.raises(ValueError, match=f"cannot decode an image of {len(data)} bytes"):
        sources.decode_image(data)


@pytest.mark.parametrize("side", [8200, 12000, 60000])
def test_bombs_are_refused_unopened(side):
    with pytest.raises(ValueError, match="limit"):
        sources.decode_image(bomb(side, side))
    with pytest.raises(ValueError, match="6 x 4 pixels is over the limit of 23"):
        sources.decode_image(encoded(), max_pixels=23)
