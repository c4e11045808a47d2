"""A fault of one row is one counted, named skip, in every source and in all that reads them."""

import io
import json
import os
import struct
import tarfile
import time
import warnings
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dmpo_jax.data import sources
from dmpo_jax.data.sources import bad_records, files, images, rows
from dmpo_jax.data.tfds import PairsConfig, PreferencePairs
from dmpo_jax.errors import UserError
from dmpo_jax.inspection.look import inspect_source
from tests.support import raw_sources
from tests.support.raw_pairs import image, make_bucket
from tests.support.raw_sources import KINDS, ROWS, TEXT, good_rows, use_all

BAD = 3  # the row with the fault


def png(width, height):
    """A complete PNG of one grey: a million pixels are three kilobytes."""

    def chunk(name, body):
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    pixels = zlib.compress((b"\0" + b"\x80" * width) * height)
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = (chunk(b"IHDR", head), chunk(b"IDAT", pixels), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def check(kind, folder, change, reason):
    """That one damaged row is skipped for this reason, and the others are as they were."""
    changed = good_rows()
    changed[BAD] = changed[BAD] | change
    good, (skipped,) = use_all(sources.open_source(raw_sources.write(kind, folder, changed)))
    assert (skipped.reason, skipped.bad) == (reason, True)
    others = [row for i, row in enumerate(good_rows()) if i != BAD]
    assert [(p.prompt, *p.images, p.preference) for p in good] == [
        tuple(r.values()) for r in others
    ]
    assert len({pair.id for pair in good} | {skipped.id}) == ROWS
    return skipped


IMAGES = {
    "a thin one": (png(1_000_000, 1), "absurd shape"),
    "a tall one": (png(20, 700), "absurd shape"),
    "a bomb": (png(9000, 8000), "absurd size"),
    "no image": (b"<svg/>", "undecodable image"),
    "cut short": (image(9, "JPEG", (64, 64))[:-90], "undecodable image"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", IMAGES)
def test_images(kind, fault, tmp_path):
    data, reason = IMAGES[fault]
    check(kind, tmp_path, {"image_0": data}, reason)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_that_are_not_utf_8(kind, tmp_path):
    as_json = kind in ("jsonl", "json", "webdataset")
    if kind != "json":  # whose rows cannot be told apart then
        reason = "unreadable" if kind == "hf" else "not UTF-8"  # Arrow checks it with the rest
        check(kind, tmp_path, {"prompt": b'"a\xe9"'}, reason)
    if as_json:
        (tmp_path / "b").mkdir()
        check(kind, tmp_path / "b", {"prompt": "half of \ud83d"}, "not UTF-8")


@pytest.mark.parametrize("kind", KINDS)
def test_texts_too_long(kind, tmp_path):
    skipped = check(kind, tmp_path, {"prompt": "word " * 400_000}, "absurd prompt")
    assert skipped.detail == f"2000000 characters, above {rows.MAX_TEXT}"


@pytest.mark.parametrize("kind", ["jsonl", "json", "webdataset"])
def test_deep_json(kind, tmp_path):
    deep = b"[" * 100_000 + b"]" * 100_000
    check(kind, tmp_path, {"prompt": deep}, "nested too deeply")
    (tmp_path / "b").mkdir()
    check(kind, tmp_path / "b", {"prompt": b'{"a": 1'}, "not JSON") if kind != "json" else None


@pytest.mark.parametrize("kind", ["jsonl", "json", "webdataset"])
def test_endless_numbers(kind, tmp_path):
    check(kind, tmp_path, {"label_0": b"9" * 50_000}, "bad label")


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_rows_of_other_lengths(kind, tmp_path):
    file = tmp_path / f"t.{kind}"
    raw_sources.write(kind, tmp_path, good_rows())
    lines = file.read_bytes().split(b"\r\n")
    lines[1 + BAD] = lines[1 + BAD] + b",\t"
    file.write_bytes(b"\r\n".join(lines))
    good, (skipped,) = use_all(sources.open_source(f"table:{file}"))
    assert (skipped.id, skipped.reason) == (f"t.{kind}:{BAD}", "unreadable")
    assert "has 5 cells, but the header has 4" in skipped.detail
    assert [pair.id[-1] for pair in good] == [str(i) for i in range(ROWS) if i != BAD]


@pytest.mark.parametrize("kind", [*TEXT, "parquet", "hf"])
def test_paths_that_name_no_image(kind, tmp_path):
    os.mkfifo(tmp_path / "fifo.png")  # to open it would wait for ever
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    cells = {
        "http://example.com/a.png": "no image",
        "file:///etc/passwd": "no image",
        "fifo.png": "no image",
        "folder.png": "no image",
        "loop.png": "no image",
        "device.png": "outside the folder",
        "absent\x1b[31m.png": "no image",
        "x" * 5000: "no image",
        "gs://bucket/a.png": "outside the folder",
    }
    for i, (cell, reason) in enumerate(cells.items()):
        folder = tmp_path if kind in TEXT else tmp_path / str(i)
        folder.mkdir(exist_ok=True)
        if kind == "hf":
            cell = f"../{cell}" if "//" not in cell else cell
            reason = "outside the folder" if "//" not in cell else reason
        elif kind == "parquet":
            for link in ("fifo.png", "folder.png", "loop.png", "device.png"):
                os.symlink(tmp_path / link, folder / link) if link == "device.png" else None
            if cell in ("fifo.png", "loop.png", "folder.png"):
                continue  # as in tables of text
        check(kind, folder, {"image_0": cell}, reason)


@pytest.mark.parametrize("kind", [*TEXT, "parquet", "hf"])
def test_files_outside_the_folder_are_read_on_request_only(kind, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "secret.png").write_bytes(image(77))
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "secret.png")
    cells = ["../secret.png", str(tmp_path / "secret.png"), "link.png"]
    for i, cell in enumerate(cells[: 2 if kind == "hf" else 3]):
        folder = tmp_path / "data"
        if kind == "hf":
            folder = tmp_path / f"hf{i}"
            folder.mkdir()
            cell = cell.replace("..", "../..")
        skipped = check(kind, folder, {"image_0": cell}, "outside the folder")
        assert "--allow_outside" in skipped.detail
        (path,) = [p for p in folder.glob("t*") if p.name != "t.lock"]
        spec = f"{'hf' if kind == 'hf' else 'table'}:{path}"
        good, skips = use_all(sources.open_source(spec, allow_outside=True))
        assert not skips
        assert good[BAD].images[0] == image(77)


def test_buckets_have_an_outside_too(monkeypatch):
    store = make_bucket(monkeypatch)
    row = {"prompt": "a", "chosen": "1.png", "rejected": "s3://bucket/data/0.png"}
    cells = ["s3://other/0.png", "../0.png", "s3://bucket/data/../0.png", "/etc/hostname"]
    lines = [row, *({**row, "rejected": cell} for cell in cells)]
    store.pipe("s3://bucket/data/t.jsonl", "\n".join(map(json.dumps, lines)).encode())
    for path in ("bucket/data/0.png", "bucket/0.png", "other/0.png"):
        store.pipe(f"s3://{path}", image(0))
    store.pipe("s3://bucket/data/1.png", image(1))
    good, skipped = use_all(sources.open_source("table:s3://bucket/data/t.jsonl"))
    assert [pair.id for pair in good] == ["t.jsonl:0"]
    assert [skip.reason for skip in skipped] == ["outside the folder"] * 4


def test_storage_that_fails_is_no_fault_of_a_row(tmp_path, monkeypatch):
    source = sources.open_source(raw_sources.write("jsonl", tmp_path, good_rows()))

    def fail(path):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(files, "_read_local", fail)
    with pytest.raises(UserError, match=r"0-image_0\.png cannot be read now.*again later"):
        list(source.read(source.units()[0]))


def test_names_that_are_not_utf_8(tmp_path):
    """Members of a tar that was written in Latin-1: their ids are escaped, and stay apart."""
    with tarfile.open(
        tmp_path / "t.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1"
    ) as tar:
        for i, key in enumerate(("café", "cafè", "new\nline")):
            for what, data in (("chosen.png", image(i)), ("rejected.png", image(9)), ("txt", b"a")):
                info = tarfile.TarInfo(f"{key}.{what}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    good, skipped = use_all(sources.open_source(f"webdataset:{tmp_path}"))
    assert not skipped
    assert [p.id for p in good] == [
        f"t.tar:{key}" for key in (r"caf\udce9", r"caf\udce8", r"new\nline")
    ]


def test_too_little_memory_and_time(tmp_path, monkeypatch):
    """Of one image; and a row in a group of cells that do not fit."""
    decode, bad = images.decode_image, good_rows()[BAD]["image_0"]
    faults = {"out of memory": MemoryError("of 9 GB")}

    def decode_image(data, **options):
        if data == bad:
            if fault is None:
                time.sleep(5)
            else:
                raise fault
        return decode(data, **options)

    monkeypatch.setattr(bad_records, "decode_image", decode_image)
    monkeypatch.setattr(rows, "MAX_SECONDS", 1)
    for reason, fault in {**faults, "too slow": None}.items():
        folder = tmp_path / reason
        folder.mkdir()
        start = time.monotonic()
        check("pickapic", folder, {}, reason)
        assert time.monotonic() - start < 4.5 or fault


def test_a_cell_that_does_not_fit(tmp_path, monkeypatch):
    file = tmp_path / "t.parquet"
    pq.write_table(raw_sources.to_arrow(good_rows()), file, row_group_size=2)
    original = pq.ParquetFile.iter_batches

    def iter_batches(self, *args, row_groups, **kwargs):
        for i, batch in enumerate(original(self, *args, row_groups=row_groups, **kwargs)):
            if (row_groups, i) == ([1], 1):
                raise pa.ArrowMemoryError("malloc of size 99999999999 failed")
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    good, (skipped,) = use_all(sources.open_source(f"table:{file}"))
    assert (skipped.id, skipped.reason) == ("t.parquet:3", "out of memory")
    assert len(good) == ROWS - 1


def test_a_parquet_bomb_is_read_cell_by_cell(tmp_path):
    """Two kilobytes that stand for 12 GB."""
    cell = b"\0" * 20_000_000
    cells = pa.DictionaryArray.from_arrays(pa.array([0] * 300, pa.int32()), pa.array([cell]))
    labels = {"prompt": ["a"] * 300, "chosen": cells, "rejected": cells}
    pq.write_table(pa.table(labels), tmp_path / "t.parquet", store_schema=False)
    source = sources.open_source(f"table:{tmp_path}/t.parquet")
    before = pa.total_allocated_bytes()
    for item, _ in zip(source.read(source.units()[0]), range(5), strict=False):
        assert pa.total_allocated_bytes() - before < 300e6
        assert bad_records.decode_pair(item).reason == "identical images"


def test_the_images_of_a_row_have_a_limit_together(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "MAX_BYTES", 2000)
    for i in range(20):
        (tmp_path / f"{i}.png").write_bytes(image(i))
    row = {"prompt": "a", "images": [f"{i}.png" for i in range(20)], "ranks": list(range(20))}
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    good, skipped = use_all(sources.open_source(f"table:{tmp_path}/t.jsonl"))
    assert {skip.reason for skip in skipped} == {"absurd size"}
    assert sum(len(data) for data in {d for pair in good for d in pair.images}) <= 2000


def test_the_first_sample_of_a_shard_may_be_bad(tmp_path):
    changed = good_rows()
    changed[0]["prompt"] = b'"\xff"'
    spec = raw_sources.write("webdataset", tmp_path, changed)
    good, (skipped,) = use_all(sources.open_source(spec))
    assert (skipped.id, len(good)) == ("t.tar:0", ROWS - 1)


@pytest.mark.parametrize("kind", [*TEXT, "parquet", "webdataset"])
def test_a_source_is_a_regular_file(kind, tmp_path):
    file = tmp_path / f"t.{'tar' if kind == 'webdataset' else kind}"
    os.mkfifo(file)
    name = kind if kind == "webdataset" else "table"
    with pytest.raises(UserError, match="should be a file, but is a folder, a FIFO or a device"):
        sources.open_source(f"{name}:{file}")


# --- all that reads a source ----------------------------------------------------------------


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """A tar, a table and a parquet file, each with a thin image and a text that is no UTF-8."""
    found = {}
    for kind, text in (("webdataset", "\ud83d"), ("jsonl", "\ud83d"), ("pickapic", b"\xff")):
        changed = good_rows()
        changed[1]["image_1"], changed[BAD]["prompt"] = png(1_000_000, 1), text
        found[kind] = raw_sources.write(kind, tmp_path_factory.mktemp(kind), changed)
    return found


SKIPS = {"absurd shape": 1, "not UTF-8": 1}


@pytest.mark.parametrize("kind", ["webdataset", "jsonl", "pickapic"])
def test_inspection(kind, faulty, tmp_path):
    text = inspect_source(faulty[kind], tmp_path, ties="keep").read_text()
    assert all(reason in text for reason in SKIPS)


@pytest.mark.parametrize("kind", ["webdataset", "jsonl", "pickapic"])
def test_tfds_builds(kind, faulty, tmp_path):
    config = PairsConfig(name="mine", source=faulty[kind])
    builder = PreferencePairs(data_dir=str(tmp_path), config=config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        builder.download_and_prepare()
    assert json.loads((builder.data_path / "statistics.json").read_text())["skipped"] == SKIPS
