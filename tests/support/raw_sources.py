"""The same rows in every kind of source, some of their cells damaged."""

import csv
import functools
import io
import json
import pathlib
import shutil
import tarfile
import tempfile
import warnings

import pyarrow as pa
import pyarrow.parquet as pq

from dmpo_jax.data import sources
from dmpo_jax.data.encoded.shards import ShardWriter
from dmpo_jax.data.sources.counts import PairCounts
from dmpo_jax.data.tfds import PairsConfig, PreferencePairs, build
from dmpo_jax.encoding.pixels import load_pixels
from tests.support.raw_pairs import image

TEXT = ("jsonl", "json", "csv", "tsv")  # tables that name their images
KINDS = ("pickapic", "parquet", *TEXT, "webdataset", "hf", "tfds")
ROWS = 6


def good_rows() -> list[dict]:
    """Rows of {prompt, image_0, image_1, label_0}, all good."""
    return [
        {
            "prompt": f"prompt {i}, ein Bär",
            "image_0": image(2 * i),
            "image_1": image(2 * i + 1, "JPEG"),
            "label_0": (1.0, 0.0, 0.5, 1.0, 0.25, 0.0)[i],
        }
        for i in range(ROWS)
    ]


def write(kind: str, folder: pathlib.Path, rows: list[dict]) -> str:
    """Writes rows as a source; returns KIND:PATH. A text cell for an image is a path.

    A prompt in bytes is stored as it is: it may be no UTF-8.
    """
    if kind in TEXT:
        return f"table:{_write_table(kind, folder, rows)}"
    if kind == "webdataset":
        return f"webdataset:{_write_tar(folder, rows)}"
    if kind == "tfds":
        return f"tfds:{_write_build(folder, rows)}"
    table = to_arrow(rows)
    if kind == "hf":
        with warnings.catch_warnings():  # what it imports warns
            warnings.simplefilter("ignore")
            import datasets
        datasets.disable_progress_bars()
        datasets.Dataset(table).save_to_disk(folder / "t")
        return f"hf:{folder / 't'}"
    names = {"prompt": "caption", "image_0": "jpg_0", "image_1": "jpg_1", "label_0": "label_0"}
    if kind == "pickapic":
        table = table.rename_columns([names.get(name, name) for name in table.column_names])
    pq.write_table(table, folder / "t.parquet", write_page_checksum=True)
    return f"{'table' if kind == 'parquet' else kind}:{folder / 't.parquet'}"


def use_all(source) -> tuple[list, list]:
    """(good pairs, skips): does with every row what encode, inspect and TFDS builds do."""
    good, skipped = [], []
    for unit in source.units():
        prompts = set(source.prompts(unit))
        json.dumps(sorted(prompts), ensure_ascii=False).encode()
        for item in source.read(unit):
            if not isinstance(item, sources.Skipped):
                assert item.prompt in prompts
                assert 0 <= item.preference <= 1
                pixels = load_pixels(item, (), 16, "random")
                if not isinstance(pixels, sources.Skipped):
                    PairCounts().add(item.prompt, item.preference, [])
                    assert build.serialize(item)
                    good.append(item)
                    continue
                item = pixels
            assert item.reason
            assert f"{item.id}{item.detail}".isprintable()
            skipped.append(item)
    assert len(good) + len(skipped) <= len(source)
    return good, skipped


def file_of(spec: str) -> pathlib.Path:
    """The one file, or of hf and tfds the one with the rows, of a source."""
    path = pathlib.Path(spec.partition(":")[2])
    if path.is_dir():
        (path,) = [p for p in path.iterdir() if p.suffix == ".arrow" or ".array_record-" in p.name]
    return path


def to_arrow(rows: list[dict]) -> pa.Table:
    def as_struct(cell):
        return {"path": cell} if isinstance(cell, str) else {"bytes": cell}

    prompts = [x.encode() if isinstance(x, str) else x for x in column(rows, "prompt")]
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    return pa.table(
        {
            "prompt": pa.array(prompts, pa.binary()).view(pa.string()),
            **{
                name: pa.array([as_struct(cell) for cell in column(rows, name)], struct)
                for name in ("image_0", "image_1")
            },
            "label_0": pa.array(column(rows, "label_0"), pa.float64()),
        }
    )


def column(rows, name):
    return [row[name] for row in rows]


def _write_table(kind, folder, rows):
    named = []
    for i, row in enumerate(rows):
        named.append(dict(row))
        for name, cell in row.items():
            if isinstance(cell, bytes) and name.startswith("image"):
                named[-1][name] = f"{i}-{name}.png"
                (folder / named[-1][name]).write_bytes(cell)
    file = folder / f"t.{kind}"
    if kind == "jsonl":
        file.write_bytes(b"\n".join(map(to_json, named)))
    elif kind == "json":
        file.write_bytes(b"[" + b",\n".join(map(to_json, named)) + b"]")
    else:
        with file.open("w", newline="", encoding="latin-1") as stream:  # bytes as they are
            write_row = csv.writer(stream, delimiter=",\t"[kind == "tsv"]).writerow
            write_row(rows[0])
            for row in named:
                write_row([_as_latin(cell) for cell in row.values()])
    return file


def _as_latin(cell):
    if not isinstance(cell, bytes):
        cell = b"" if cell is None else str(cell).encode("utf-8", "surrogatepass")
    return cell.decode("latin-1")


def to_json(row) -> bytes:
    """A row as JSON; a cell in bytes is the JSON of that cell."""
    cells = {n: x if isinstance(x, bytes) else json.dumps(x).encode() for n, x in row.items()}
    parts = [b'"%s": %s' % (name.encode(), cell) for name, cell in cells.items()]
    return b"{" + b", ".join(parts) + b"}"


def _write_tar(folder, rows, names=None):
    file = folder / "t.tar"
    with tarfile.open(file, "w") as tar:
        for i, row in enumerate(rows):
            about = {name: row[name] for name in ("prompt", "label_0")}
            members = {"jpg_0": row["image_0"], "jpg_1": row["image_1"], "json": to_json(about)}
            for what, data in members.items():
                info = tarfile.TarInfo(f"{i}.{what}")
                info.size = len(data or b"")
                tar.addfile(info, io.BytesIO(data or b""))
    return file


@functools.cache
def _build() -> pathlib.Path:
    """A TFDS build of good rows, in one shard of one split."""
    folder = pathlib.Path(tempfile.mkdtemp())
    config = PairsConfig(
        name="mine", source=write("pickapic", folder, good_rows()), validation_fraction=0.0
    )
    builder = PreferencePairs(data_dir=str(folder / "built"), config=config)
    builder.download_and_prepare()
    return pathlib.Path(builder.data_dir)


def _write_build(folder, rows):
    shutil.copytree(_build(), folder / "t")
    (file,) = (folder / "t").glob("*.array_record-*")
    with ShardWriter(folder / "t", file.name) as writer:
        for i, row in enumerate(rows):
            prompt, images = row["prompt"], (row["image_0"], row["image_1"])
            pair = sources.RawPair(f"t:{i}", prompt, images, row["label_0"])
            writer.write(build.serialize(pair))
        writer.close()
    return folder / "t"
