"""Damaged inputs of every reader: each gives counted skips, a UserError, or the same pairs.

Never a hang, another exception, or a wrong pair. Half of the cases damage cells of one row, in
which the other rows must be as they were. The others damage bytes of the file; what is then read is
compared with a second, independent reading, since a flipped bit in a prompt of a JSON file is a
prompt like any other. Parquet and TFDS files carry checksums: there every pair is the original.
`pytest -m slow -s tests/hostile` runs more seeds and prints the counts.
"""

import collections
import contextlib
import csv
import io
import json
import math
import re
import signal
import tarfile
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dmpo_jax.data import sources
from dmpo_jax.data.prompt_files import load_prompts
from dmpo_jax.data.sources.bad_records import decode_pair
from dmpo_jax.errors import UserError
from tests.support import raw_sources
from tests.support.raw_pairs import image
from tests.support.raw_sources import KINDS, ROWS, TEXT, good_rows, use_all

SEEDS, MORE = range(24), range(1000, 1500)  # of each reader
CPU_SECONDS, SECONDS = 20, 300  # for any one input


@contextlib.contextmanager
def time_limit():
    """Ends a case that computes for long or, however busy the machine is, waits for ever."""

    def stop(*_):
        raise AssertionError("hangs")

    timers = {
        signal.ITIMER_PROF: (signal.SIGPROF, CPU_SECONDS),
        signal.ITIMER_REAL: (signal.SIGALRM, SECONDS),
    }
    before = {number: signal.signal(number, stop) for number, _ in timers.values()}
    for timer, (_, seconds) in timers.items():
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


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


def pick(rng, values):
    return values[rng.integers(0, len(values))]


# --- cells ------------------------------------------------------------------------------------

TEXTS = (None, "", " ", "a\0b", "\u2028", "e\u0301", "\U0001f3f4\u200d", "x" * 9999, "x" * 99_999)
NOT_UTF_8 = (b'"\xff"', b'"\\ud83d"', b'"caf\xe9"')
JSON = (3, True, [], {}, {"a": [1]}, [[["a"]]], -1, b"[" * 50_000, b'{"a":' * 50_000, b"9" * 9999)
LABELS = (None, math.nan, math.inf, -1.0, 2.0, 0.75)
PATHS = (
    "../..",
    "http://a/b.png",
    "a\0b",
    "/dev/zero",
    ".",
    "x" * 9999,
    "~",
    "gs://a/b",
    "\x1b[2J",
)


def cell_of(kind, name, rng):
    """A value to put in place of a cell, of a type that this kind of file can hold."""
    as_json = kind in ("jsonl", "json", "webdataset")
    if name.startswith("image"):
        damaged = BYTES[rng.integers(0, len(BYTES))](image(99), rng)
        values = [damaged, damaged, b"\xff\xd8\xff"]
        values += [] if kind == "tfds" else [b""]
        values += PATHS if kind in ("parquet", "hf", *TEXT) else ()
        return pick(rng, values + [*JSON] * (kind in ("jsonl", "json")))
    if name == "label_0":
        return pick(rng, [*LABELS, *JSON, "yes"] if as_json else LABELS[kind == "tfds" :])
    values = [x for x in TEXTS if x is not None or kind != "tfds"] + [*NOT_UTF_8]
    return pick(rng, values + [*JSON] * as_json)


def said(kind, cell):
    """The value of a cell as another reader has it; None if there is none."""
    if kind in ("jsonl", "json", "webdataset"):
        try:
            return json.loads(cell) if isinstance(cell, bytes) else cell
        except (ValueError, RecursionError):
            return None
    if isinstance(cell, bytes):
        return cell.decode("utf-8", "replace")  # what is replaced is skipped, or else unequal
    return str(cell) if kind in ("csv", "tsv") else cell


def damage_cells(kind, folder, rng):
    """(spec, expected): a source in which one row is damaged."""
    rows, bad = good_rows(), int(rng.integers(0, ROWS))
    name = str(rng.choice(list(rows[0])))
    before, cell = rows[bad], cell_of(kind, name, rng)
    rows[bad] = {**before, name: cell}

    def expected(item):
        wanted = good_rows()[row_of(item)]
        if row_of(item) == bad:
            value = cell if name.startswith("image") else said(kind, cell)
            assert name != "label_0" or is_label(value) or is_label(float(value)), value
            wanted = {**wanted, name: float(value) if name == "label_0" else value}
        return tuple(wanted.values())

    return raw_sources.write(kind, folder, rows), expected, bad


def row_of(item):
    return int(re.fullmatch(r".*:(\d+)", item.id)[1])


def is_label(value):
    return isinstance(value, float | int) and math.isfinite(value) and 0 <= value <= 1


# --- bytes ------------------------------------------------------------------------------------


def damage_bytes(kind, folder, rng):
    """(spec, expected): a source of which the file with the rows is damaged."""
    spec, rows = raw_sources.write(kind, folder, good_rows()), good_rows()
    file = raw_sources.file_of(spec)
    whole = file.read_bytes()
    data = pick(rng, BYTES)(whole, rng)
    places = places_in(file) if kind == "webdataset" else {}
    if places and rng.integers(0, 2):  # a member's content, in place
        place = places[str(rng.integers(0, ROWS)), str(rng.choice(["json", "jpg_0"]))]
        changed = pick(rng, (flip_bits, zero, enlarge))(whole[place], rng)
        data = whole[: place.start] + changed + whole[place.start + len(changed) :]
    file.write_bytes(data)
    names = {row[f"image_{k}"]: f"{i}-image_{k}.png" for i, row in enumerate(rows) for k in (0, 1)}

    def expected(item):
        i, found = row_of(item), None
        if kind == "jsonl":
            lines = [line for line in data.split(b"\n") if line.strip()]
            found = json.loads(lines[i].decode("utf-8-sig"))
        elif kind == "json":
            found = json.loads(data.decode("utf-8-sig"))[i]
        elif kind == "webdataset":
            key = str(i)
            found = json.loads(data[places[key, "json"]])
            found |= {f"image_{k}": data[places[key, f"jpg_{k}"]] for k in (0, 1)}
        elif kind in ("csv", "tsv"):
            text = io.StringIO(data.decode("latin-1"), newline="")
            lines = csv.reader(text, delimiter=",\t"[kind == "tsv"])
            cells = [item.prompt.encode().decode("latin-1"), *(names[x] for x in item.images)]
            assert any(set(cells) <= set(line) for line in lines)
            return None
        elif kind == "hf":  # without checksums, other values may be as good
            return None
        else:
            found = rows[i]
        if kind in ("jsonl", "json"):
            found |= {name: by_name[found[name]] for name in ("image_0", "image_1")}
        assert is_label(found["label_0"])
        return tuple(found[name] for name in rows[0])

    by_name = {name: data for data, name in names.items()}
    return spec, expected, None


def places_in(file):
    """Where in a shard the content of each (key, what) lies."""
    with tarfile.open(file) as tar:
        return {
            tuple(info.name.split(".")): slice(info.offset_data, info.offset_data + info.size)
            for info in tar
        }


def damage_metadata(folder, rng):
    """(spec, expected): a TFDS build of which a JSON file is damaged."""
    spec = raw_sources.write("tfds", folder, good_rows())
    names = ("features.json", "dataset_info.json", "statistics.json")
    file = folder / "t" / str(rng.choice(names))
    file.write_bytes(pick(rng, BYTES)(file.read_bytes(), rng))
    return spec, lambda item: tuple(good_rows()[row_of(item)].values()), None


# --- columns ----------------------------------------------------------------------------------


def swap_names(table, rng):
    """Columns under each other's names."""
    names = table.column_names
    i, j = rng.choice(4, 2, replace=False)
    if {names[i], names[j]} & {"image_0", "jpg_0"}:  # the other image is no one to tell from
        i, j = 0, 3
    names[i], names[j] = names[j], names[i]
    return table.rename_columns(names)


def drop_column(table, rng):
    return table.drop_columns([str(rng.choice(table.column_names))])


def repeat_column(table, rng):
    i = int(rng.integers(0, table.num_columns))
    return table.append_column(table.column_names[i], table.column(i))


def retype_column(table, rng):
    i = int(rng.integers(0, table.num_columns))
    other = pick(rng, (pa.array([[1]] * ROWS), pa.array([7] * ROWS), pa.nulls(ROWS)))
    return table.set_column(i, table.column_names[i], other)


def reorder(table, rng):
    """No damage: columns in another order."""
    return table.select([table.column_names[i] for i in rng.permutation(table.num_columns)])


def damage_columns(kind, folder, rng):
    spec = raw_sources.write(kind, folder, good_rows())
    file = raw_sources.file_of(spec)
    change = pick(rng, (swap_names, drop_column, repeat_column, retype_column, reorder))
    pq.write_table(change(pq.read_table(file), rng), file)
    return spec, lambda item: tuple(good_rows()[row_of(item)].values()), None


# --- all --------------------------------------------------------------------------------------


def damaged(kind, folder, rng):
    way = rng.integers(0, 4)
    if way == 0 and kind in ("pickapic", "parquet"):
        return damage_columns(kind, folder, rng)
    if way == 0 and kind == "tfds":
        return damage_metadata(folder, rng)
    return (damage_bytes if way % 2 else damage_cells)(kind, folder, rng)


def run_source(kind, seeds, tmp_path):
    outcomes = collections.Counter()
    for seed in seeds:
        folder = tmp_path / str(seed)
        folder.mkdir()
        try:
            with time_limit():
                outcomes[try_source(*damaged(kind, folder, np.random.default_rng(seed)))] += 1
        except Exception as error:
            raise AssertionError(f"{kind}, seed {seed}: {type(error).__name__}") from error
    return outcomes


def try_source(spec, expected, bad):
    try:
        good, skipped = use_all(sources.open_source(spec))
    except UserError as error:
        if raw_sources.file_of(spec).parent.name not in str(error):
            raise AssertionError("names no file") from error
        return "refused"
    for item in good:
        wanted = expected(item)
        assert wanted in (None, (item.prompt, *item.images, item.preference)), item.id
    if bad is not None:
        assert {row_of(item) for item in good} >= {*range(ROWS)} - {bad}
        assert len(good) + len(skipped) == ROWS
    return "skips" if skipped else "harmless"


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_sources(kind, tmp_path):
    outcomes = run_source(kind, SEEDS, tmp_path)
    assert outcomes["skips"] >= 3, outcomes
    assert outcomes["refused"] >= 1, outcomes


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_sources_of_many_seeds(kind, tmp_path):
    print(f"{kind}: {dict(run_source(kind, MORE, tmp_path))}")


# --- prompt files -----------------------------------------------------------------------------

FORMATS = ("txt", "json", "jsonl", "csv", "tsv", "parquet")


def write_prompts(kind, file, rows):
    if kind == "txt":
        file.write_bytes(b"\n".join(as_bytes(row["prompt"]) for row in rows))
    elif kind == "parquet":
        table = raw_sources.to_arrow([{**good_rows()[0], **row} for row in rows])
        pq.write_table(table, file, write_page_checksum=True)
    elif kind in ("csv", "tsv"):
        mark = b"," if kind == "csv" else b"\t"
        lines = [b"prompt" + mark + b"seed"]
        lines += [as_bytes(row["prompt"]) + mark + as_bytes(row["seed"]) for row in rows]
        file.write_bytes(b"\n".join(lines))
    else:
        mark = {"json": (b"[", b", ", b"]"), "jsonl": (b"", b"\n", b"")}[kind]
        file.write_bytes(mark[0] + mark[1].join(map(raw_sources.to_json, rows)) + mark[2])


def as_bytes(cell):
    if isinstance(cell, bytes):
        return cell
    return b"" if cell is None else str(cell).encode("utf-8", "surrogatepass")


def damage_prompts(kind, folder, rng):
    file, rows = folder / f"prompts.{kind}", [{"prompt": f"p {i}", "seed": i} for i in range(ROWS)]
    if rng.integers(0, 2):
        i, as_json = rng.integers(0, ROWS), kind in ("json", "jsonl")
        values = [*TEXTS, *NOT_UTF_8, *[*JSON] * as_json]
        rows[i] = {**rows[i], "prompt": pick(rng, values)}
        if as_json:
            values = [*PATHS, *LABELS, *JSON, *TEXTS, 2**40]
            rows[i][str(rng.choice(["seed", "image", "negative_prompt"]))] = pick(rng, values)
        write_prompts(kind, file, rows)
    else:
        write_prompts(kind, file, rows)
        file.write_bytes(pick(rng, BYTES)(file.read_bytes(), rng))
    return file


def run_prompts(kind, seeds, tmp_path):
    outcomes = collections.Counter()
    for seed in seeds:
        file = damage_prompts(kind, tmp_path, np.random.default_rng(seed))
        try:
            with time_limit():
                found = load_prompts(file)
        except UserError as error:
            outcomes["refused" if file.name in str(error) else "names no file"] += 1
        except Exception as error:
            raise AssertionError(f"{kind}, seed {seed}: {type(error).__name__}") from error
        else:
            outcomes["harmless"] += 1
            assert all(prompt.text == prompt.text.encode().decode() for prompt in found)
            assert all(prompt.seed is None or 0 <= prompt.seed < 2**32 for prompt in found)
    assert not outcomes["names no file"]
    return outcomes


@pytest.mark.parametrize("kind", FORMATS)
def test_prompt_files(kind, tmp_path):
    outcomes = run_prompts(kind, SEEDS, tmp_path)
    assert outcomes["refused"] >= 1, outcomes


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_prompt_files_of_many_seeds(kind, tmp_path):
    print(f"{kind}: {dict(run_prompts(kind, MORE, tmp_path))}")


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
    for seed in range(50):
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
    assert reasons.total() == 50
    assert reasons["absurd size"] >= 4
    assert reasons["undecodable image"] > 10
    assert set(reasons) <= {"absurd size", "undecodable image", "no image", "decoded"}


@pytest.mark.parametrize("kind", BYTES)
def test_mutations_mutate(kind):
    data = image(0)
    assert any(kind(data, np.random.default_rng(seed)) != data for seed in range(3))
