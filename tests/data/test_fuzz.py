"""200 damaged inputs: each gives counted skips or a clear error, and never a wrong pair.

What a source yields is compared with what the damaged bytes say to a second, independent
reading, since a flipped bit in a prompt of a JSON file is a prompt like any other. Parquet
carries checksums of its pages, so there every pair equals the undamaged one.
"""

import collections
import contextlib
import io
import json
import math
import signal
import tarfile
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dmpo_jax.data import sources
from dmpo_jax.data.sources.bad_records import Tally, decode_pair
from tests.support.raw_pairs import image, write_images

ROWS = 6
SEEDS = range(50)  # of each of the four kinds
SECONDS = 5  # for any one input
LABELS = (1.0, 0.0, 0.5, 1.0, 0.25, 0.0)


@contextlib.contextmanager
def time_limit():
    def stop(*_):
        raise AssertionError(f"hangs for {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def flip_bits(data, rng):
    array = np.frombuffer(data, np.uint8).copy()
    places = rng.integers(0, len(array), rng.integers(1, 9))
    np.bitwise_xor.at(array, places, (1 << rng.integers(0, 8, len(places))).astype(np.uint8))
    return array.tobytes()


def cut(data, rng):
    return data[: rng.integers(0, len(data))]


def _range(data, rng):
    start = rng.integers(0, len(data))
    return start, min(start + rng.integers(1, 600), len(data))


def zero(data, rng):
    start, stop = _range(data, rng)
    return data[:start] + bytes(stop - start) + data[stop:]


def delete(data, rng):
    start, stop = _range(data, rng)
    return data[:start] + data[stop:]


def repeat(data, rng):
    start, stop = _range(data, rng)
    return data[:stop] + data[start:]


def insert(data, rng):
    start, _ = _range(data, rng)
    return data[:start] + rng.bytes(rng.integers(1, 600)) + data[start:]


def enlarge(data, rng):
    """Some size or offset becomes huge."""
    start = rng.integers(0, max(len(data) - 4, 1))
    return data[:start] + b"\xff\xff\xff\x7f" + data[start + 4 :]


def flip_in_tail(data, rng):
    """Where parquet has its footer."""
    place = max(len(data) - 4000, 0)
    return data[:place] + flip_bits(data[place:], rng)


BYTES = (flip_bits, flip_in_tail, cut, zero, delete, repeat, insert, enlarge)


def original():
    return [
        {
            "caption": f"prompt {i}",
            "jpg_0": image(2 * i, "JPEG"),
            "jpg_1": image(2 * i + 1, "JPEG"),
            "label_0": LABELS[i],
        }
        for i in range(ROWS)
    ]


def as_pair(name, row):
    images = (row["jpg_0"], row["jpg_1"])
    return sources.RawPair(name, row["caption"], images, float(row["label_0"]))


def is_label(value):
    return isinstance(value, float | int) and math.isfinite(value) and 0 <= value <= 1


def run(spec, name, expected, outcomes):
    """Reads all of a source; pairs are compared with expected(id) -> RawPair."""
    tally = Tally(1.0, total=10_000)
    try:
        source = sources.open_source(spec)
        length, units = len(source), source.units()
        found = [item for unit in units for item in source.read(unit)]
        for unit in units:
            list(source.prompts(unit))
    except ValueError as error:
        if name not in str(error):
            raise AssertionError(f"does not say which file: {error}") from error
        outcomes["error"] += 1
        return
    assert len(found) <= length
    for item in found:
        if isinstance(item, sources.Skipped):
            assert item.reason
            tally.skip(item)
            continue
        assert item == expected(item.id), item.id
        assert 0 <= item.preference <= 1
        decoded = decode_pair(item)
        if isinstance(decoded, sources.Skipped):
            tally.skip(decoded)
        else:
            tally.ok()
    assert tally.good + sum(tally.counts.values()) == len(found)
    outcomes["skips" if tally.counts else "pairs"] += 1


# --- parquet ------------------------------------------------------------------------


def swap_names(table, rng):
    """Columns under each other's names."""
    names = table.column_names
    i, j = rng.choice(5, 2, replace=False)
    if {names[i], names[j]} == {"jpg_0", "jpg_1"}:  # which no one could tell
        j = names.index("caption")
    names[i], names[j] = names[j], names[i]
    return table.rename_columns(names)


def drop_column(table, rng):
    return table.drop_columns([str(rng.choice(sources.PICK_A_PIC.names[:4]))])


def repeat_column(table, rng):
    i = int(rng.integers(0, 4))
    return table.append_column(table.column_names[i], table.column(i))


def bad_cells(table, rng):
    """In one row, in place of what a column of its type may hold."""
    rows, i = table.to_pylist(), rng.integers(0, len(table))
    bad = {
        "caption": [None],
        "jpg_0": [None, b"", b"\xff\xd8\xff"],
        "label_0": [None, float("nan"), float("inf"), -1.0, 2.0],
        "label_1": [0.7],
    }
    name = str(rng.choice(list(bad)))
    rows[i][name] = bad[name][rng.integers(0, len(bad[name]))]
    return pa.Table.from_pylist(rows, schema=table.schema)


def reorder(table, rng):
    """No damage: columns in another order."""
    return table.select([table.column_names[i] for i in rng.permutation(table.num_columns)])


TABLES = (swap_names, drop_column, repeat_column, bad_cells, bad_cells, reorder)


def test_parquet(tmp_path):
    file, rows = tmp_path / "x.parquet", original()
    sources.write_pick_a_pic(file, rows)
    whole, table, outcomes = file.read_bytes(), pq.read_table(file), collections.Counter()
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        known = rows
        if seed % 3:
            file.write_bytes(BYTES[seed % len(BYTES)](whole, rng))
        else:
            changed = TABLES[seed // 3 % len(TABLES)](table, rng)
            pq.write_table(changed, file, write_page_checksum=True)
            if len(set(changed.column_names)) == changed.num_columns:
                known = changed.to_pylist()

        def expected(name, known=known):
            return as_pair(name, known[int(name.rpartition(":")[2])])

        with time_limit():
            run(f"pickapic:{file}", "x.parquet", expected, outcomes)
    assert outcomes.total() == len(SEEDS)
    assert outcomes["error"] > 20
    assert outcomes["skips"] >= 1
    assert outcomes["pairs"] >= 1


# --- tar ----------------------------------------------------------------------------


def write_tar(file, rows):
    """The rows as a shard; where in it each (key, what) lies, and the end of the last."""
    places, end = {}, 0
    with tarfile.open(file, "w") as tar:
        for i, row in enumerate(rows):
            about = {"prompt": row["caption"], "label_0": row["label_0"]}
            for what in ("jpg_0", "jpg_1", "json"):
                data = row.get(what) or json.dumps(about).encode()
                info = tarfile.TarInfo(f"{i}.{what}")
                info.size = len(data)
                start = tar.offset + tarfile.BLOCKSIZE
                tar.addfile(info, io.BytesIO(data))
                places[str(i), what] = slice(start, start + len(data))
                end = tar.offset
    return places, end


def test_tar(tmp_path):
    file, rows, outcomes = tmp_path / "x.tar", original(), collections.Counter()
    places, end = write_tar(file, rows)
    whole = file.read_bytes()
    assert all(whole[places[str(i), "jpg_0"]] == row["jpg_0"] for i, row in enumerate(rows))
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        if seed % 2:  # a member's content, in place
            place = places[str(rng.integers(0, ROWS)), ("json", "jpg_0")[seed // 2 % 2]]
            changed = (flip_bits, zero, enlarge)[seed // 4 % 3](whole[place], rng)
            data = whole[: place.start] + changed + whole[place.start + len(changed) :]
        else:
            data = BYTES[seed // 2 % len(BYTES)](whole[:end], rng) + whole[end:]
        file.write_bytes(data)

        def expected(name, data=data):
            key = name.rpartition(":")[2]
            first, second, about = (data[places[key, w]] for w in ("jpg_0", "jpg_1", "json"))
            about = json.loads(about)
            assert is_label(about["label_0"])
            row = {"caption": about["prompt"], "jpg_0": first, "jpg_1": second}
            return as_pair(name, row | {"label_0": about["label_0"]})

        with time_limit():
            run(f"webdataset:{file}", "x.tar", expected, outcomes)
    assert outcomes.total() == len(SEEDS)
    assert outcomes["error"] > 10
    assert outcomes["skips"] > 5


# --- JSON lines ---------------------------------------------------------------------

BAD_VALUES = (None, "", 3, -1, 1.5, float("nan"), 1e400, True, [], {}, "a\0b", "../..", "x" * 9999)


def bad_value(lines, rng):
    i = rng.integers(0, len(lines))
    row = json.loads(lines[i])
    name = str(rng.choice(list(row)))
    row[name] = BAD_VALUES[rng.integers(0, len(BAD_VALUES))]
    return [*lines[:i], json.dumps(row).encode(), *lines[i + 1 :]]


def drop_key(lines, rng):
    i = rng.integers(0, len(lines))
    row = json.loads(lines[i])
    del row[str(rng.choice(list(row)))]
    return [*lines[:i], json.dumps(row).encode(), *lines[i + 1 :]]


def bad_line(lines, rng):
    bad = (b"[" * 200_000, b"{", b"null", b"\xff\xfe{", b'{"a": ' * 50_000, b"9" * 9999, b"\r")
    i = rng.integers(0, len(lines))
    return [*lines[:i], bad[rng.integers(0, len(bad))], *lines[i + 1 :]]


def test_json_lines(tmp_path):
    file, images = tmp_path / "x.jsonl", write_images(tmp_path, 2 * ROWS)
    rows = [
        {
            "prompt": f"prompt {i}",
            "image_0": f"{2 * i}.png",
            "image_1": f"{2 * i + 1}.png",
            "label_0": LABELS[i],
        }
        for i in range(ROWS)
    ]
    lines, outcomes = [json.dumps(row).encode() for row in rows], collections.Counter()
    named = {f"{i}.png": data for i, data in enumerate(images)}
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        if seed % 2:
            data = b"\n".join((bad_value, drop_key, bad_line)[seed // 2 % 3](lines, rng))
        else:
            data = BYTES[seed // 2 % len(BYTES)](b"\n".join(lines), rng)
        file.write_bytes(data)

        def expected(name, data=data):
            said = [line for line in data.split(b"\n") if line.strip()]
            row = json.loads(said[int(name.rpartition(":")[2])].decode("utf-8-sig"))
            assert isinstance(row["prompt"], str)
            assert is_label(row["label_0"])
            cells = {f"jpg_{i}": named[row[f"image_{i}"]] for i in range(2)}
            return as_pair(name, {"caption": row["prompt"], "label_0": row["label_0"], **cells})

        with time_limit():
            run(f"table:{file}", "x.jsonl", expected, outcomes)
    assert outcomes.total() == len(SEEDS)
    assert outcomes["skips"] > 20


# --- JPEG ---------------------------------------------------------------------------


def huge(data, rng):
    """A header that claims up to 65535 x 65535 pixels."""
    frame = data.index(b"\xff\xc0") + 5
    sides = rng.integers(9000, 65536, 2).astype(">u2").tobytes()
    return data[:frame] + sides + data[frame + 4 :]


def no_size(data, rng):
    frame = data.index(b"\xff\xc0") + 5
    return data[:frame] + bytes(4) + data[frame + 4 :]


def header_bits(data, rng):
    return flip_bits(data[:620], rng) + data[620:]


def test_jpeg():
    whole, other = image(0, "JPEG", (64, 48)), image(1, "JPEG", (48, 64))
    untouched = np.array(Image.open(io.BytesIO(other)))
    ways, reasons = (*BYTES, huge, no_size, header_bits), collections.Counter()
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        data = ways[seed % len(ways)](whole, rng)
        pair = sources.RawPair(str(seed), "a", (other, data), 1.0)
        with time_limit(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of files that it can read in part
            found = decode_pair(pair)
            if isinstance(found, sources.Skipped):
                assert found.id == str(seed)
                reasons[found.reason] += 1
                continue
            reasons["decoded"] += 1
            assert found.pair is pair
            np.testing.assert_array_equal(found.images[0], untouched)
            again = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
            np.testing.assert_array_equal(found.images[1], again)
    assert reasons.total() == len(SEEDS)
    assert reasons["absurd size"] >= 4
    assert reasons["undecodable image"] > 10
    assert set(reasons) <= {"absurd size", "undecodable image", "no image", "decoded"}


@pytest.mark.parametrize("kind", BYTES)
def test_mutations_mutate(kind):
    data = image(0)
    assert any(kind(data, np.random.default_rng(seed)) != data for seed in range(3))
