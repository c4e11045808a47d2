"""Raw pairs from where people keep them: every source yields `RawPair`.

Add a source: a class with `__iter__` over RawPairs, `__len__` and `skipped`, and a line in
SOURCES.
"""

import collections
import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath
from jaxtyping import UInt8
from PIL import Image

REQUIRED = ("caption", "jpg_0", "jpg_1", "label_0")
FLAGS = ("has_label", "are_different")
GIVEN = {"source": "jpg_source", "mask": "mask"}  # field of RawPair -> optional column
MAX_PIXELS = 8192 * 8192
ROWS_AT_ONCE = 64  # of about 200 kB each; the hub's row groups hold gigabytes

PICK_A_PIC = pa.schema(
    {
        "caption": pa.string(),
        "jpg_0": pa.binary(),
        "jpg_1": pa.binary(),
        "label_0": pa.float64(),
        "label_1": pa.float64(),
        "image_0_uid": pa.string(),
        "image_1_uid": pa.string(),
        "best_image_uid": pa.string(),
        "model_0": pa.string(),
        "model_1": pa.string(),
        "has_label": pa.bool_(),
        "are_different": pa.bool_(),
        # Ours, null where a model is given no image.
        "jpg_source": pa.binary(),
        "mask": pa.binary(),
    }
)


class RawPair(NamedTuple):
    """Two encoded images (JPEG, PNG, ...) of one prompt, in the order of the source.

    preference: the probability, in [0, 1], that image 0 is preferred; 0.5 is a tie.
    source: the encoded image that both images edit or repaint. mask: an encoded image of the
    source's shape, white where it is repainted.
    """

    id: str
    prompt: str
    images: tuple[bytes, bytes]
    preference: float
    source: bytes | None = None
    mask: bytes | None = None


@runtime_checkable
class Source(Protocol):
    """What encode reads. skipped: rows left out, by reason."""

    @property
    def skipped(self) -> Mapping[str, int]: ...
    def __iter__(self) -> Iterator[RawPair]: ...
    def __len__(self) -> int: ...


class PickAPic:
    """Pairs in the parquet schema of the hub's Pick-a-Pic datasets.

    Columns: caption, jpg_0, jpg_1 and label_0 (1: image 0 preferred, 0: image 1, 0.5: a
    tie); where has_label and are_different are present, rows with either false are skipped.
    For editing models also jpg_source, for inpainting models jpg_source and mask.

    Args:
        path: a parquet file, a folder of them, or a pattern (`data/train-*.parquet`: the
            hub keeps all splits in one folder).

    `len` counts the rows that labels and flags admit. Rows without an image are found, and
    counted in `skipped`, only as they are read.

    Raises:
        FileNotFoundError: if there is no parquet file.
        ValueError: if a file lacks a column or is not parquet, before any image is read.
    """

    def __init__(self, path: epath.PathLike):
        self._files = _parquet_files(epath.Path(path))
        self.skipped = collections.Counter()
        self._length = 0
        for file in self._files:
            for number, row in _rows(file, ("label_0", *FLAGS)):
                if reason := _label_reason(row):
                    self.skipped[reason] += 1
                    continue
                if not 0 <= row["label_0"] <= 1:
                    raise ValueError(
                        f"{file}, row {number}: label_0 must lie in [0, 1], but got "
                        f"{row['label_0']}"
                    )
                self._length += 1

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[RawPair]:
        for reason in ("no image", "no caption"):  # counted anew by each pass
            self.skipped.pop(reason, None)
        for file in self._files:
            for number, row in _rows(file, (*REQUIRED, *FLAGS, *GIVEN.values())):
                if _label_reason(row):
                    continue
                if not (row["jpg_0"] and row["jpg_1"]):
                    self.skipped["no image"] += 1
                elif row["caption"] is None:
                    self.skipped["no caption"] += 1
                else:
                    images = (row["jpg_0"], row["jpg_1"])
                    given = {field: row.get(column) or None for field, column in GIVEN.items()}
                    name = f"{file.name}:{number}"
                    yield RawPair(name, row["caption"], images, row["label_0"], **given)


SOURCES: dict[str, Callable[[str], Source]] = {"pickapic": PickAPic}


def open_source(spec: str) -> Source:
    """Opens `KIND:PATH`, such as `pickapic:gs://bucket/data`.

    Raises:
        ValueError: if the kind is unknown or the path missing, naming the known kinds.
    """
    kind, _, path = spec.partition(":")
    if kind not in SOURCES or not path:
        raise ValueError(
            f"a source is KIND:PATH with KIND one of {sorted(SOURCES)}, but got {spec!r}"
        )
    return SOURCES[kind](path)


def write_pick_a_pic(path: epath.PathLike, rows: Iterable[Mapping[str, Any]]) -> int:
    """Writes rows in the hub's schema, so that `PickAPic(path)` reads them.

    Args:
        path: the parquet file; it appears whole or not at all.
        rows: with caption, jpg_0, jpg_1, label_0 and any other column of PICK_A_PIC; what
            is left out is derived from these.

    Returns:
        The number of rows written.

    Raises:
        ValueError: if a row lacks a required column, has an unknown one, or its label lies
            outside [0, 1].
    """
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.partial"
    count, chunk = 0, []
    try:
        with partial.open("wb") as file, pq.ParquetWriter(file, PICK_A_PIC) as writer:

            def flush() -> None:
                writer.write_table(pa.Table.from_pylist(chunk, schema=PICK_A_PIC))
                chunk.clear()

            for count, row in enumerate(rows, start=1):  # noqa: B007
                chunk.append(_full_row(row))
                if len(chunk) == ROWS_AT_ONCE:
                    flush()
            flush()
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return count


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> UInt8[np.ndarray, "H W 3"]:
    """An encoded image -> RGB in [0, 255]; other modes are converted, alpha is dropped.

    Raises:
        ValueError: if the bytes are no whole image that Pillow knows, or it has more than
            max_pixels (so that a small file cannot fill the memory).
    """
    # Pillow raises whatever its format plugins do, OverflowError and SyntaxError among it.
    try:
        image = Image.open(io.BytesIO(data))
        pixels = image.width * image.height
        if pixels <= max_pixels:
            return np.array(image.convert("RGB"))
    except Exception as error:
        raise ValueError(f"cannot decode an image of {len(data)} bytes: {error}") from error
    raise ValueError(
        f"an image of {image.width} x {image.height} pixels is over the limit of {max_pixels}"
    )


def decode_mask(data: bytes, *, max_pixels: int = MAX_PIXELS) -> UInt8[np.ndarray, "H W 1"]:
    """An encoded mask -> 1 where it is nearer to white than to black, else 0.

    Raises:
        ValueError: as `decode_image`.
    """
    grey = Image.fromarray(decode_image(data, max_pixels=max_pixels)).convert("L")
    return (np.asarray(grey) >= 128).astype(np.uint8)[..., None]


def encode_image(image: UInt8[np.ndarray, "H W 3"], *, quality: int = 95) -> bytes:
    """The inverse of `decode_image`: a JPEG of full colour resolution."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def _parquet_files(path: epath.Path) -> list[epath.Path]:
    """The files that a path stands for, sorted, each with the columns needed."""
    if "*" in path.name:
        files = sorted(path.parent.glob(path.name))
    elif path.is_dir():
        files = sorted(path.glob("*.parquet"))
    else:
        files = [path] if path.exists() else []
    if not files:
        raise FileNotFoundError(f"no parquet file at {path}")
    for file in files:
        with file.open("rb") as stream:
            try:
                found = pq.read_schema(stream).names
            except pa.ArrowInvalid as error:
                raise ValueError(f"{file} is not a whole parquet file: {error}") from error
        if missing := [name for name in REQUIRED if name not in found]:
            raise ValueError(
                f"{file} is not in Pick-a-Pic's schema: it needs the columns "
                f"{list(REQUIRED)}, lacks {missing} and has {sorted(found)}"
            )
    return files


def _rows(file: epath.Path, columns: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number, row) with those of the columns that the file has, a few rows in memory."""
    with file.open("rb") as stream:
        parquet = pq.ParquetFile(stream)
        present = [name for name in columns if name in parquet.schema_arrow.names]
        batches = parquet.iter_batches(batch_size=ROWS_AT_ONCE, columns=present)
        yield from enumerate(row for batch in batches for row in batch.to_pylist())


def _label_reason(row: Mapping[str, Any]) -> str | None:
    """Why a row is skipped, as far as flags and label say, or None."""
    if row.get("has_label") is False or row["label_0"] is None:
        return "no label"
    if row.get("are_different") is False:
        return "equal images"
    return None


def _full_row(row: Mapping[str, Any]) -> dict[str, Any]:
    missing = [name for name in REQUIRED if row.get(name) is None]
    unknown = sorted(set(row) - set(PICK_A_PIC.names))
    if missing or unknown:
        raise ValueError(
            f"a row needs {list(REQUIRED)} and may have {PICK_A_PIC.names}, but lacks "
            f"{missing} and has {unknown}"
        )
    label = row["label_0"]
    if not 0 <= label <= 1:
        raise ValueError(f"label_0 must lie in [0, 1], but got {label}")
    # Content hashes: the same image has the same uid in every file.
    uids = [hashlib.sha256(row[name]).hexdigest()[:32] for name in ("jpg_0", "jpg_1")]
    derived = {
        "label_1": 1 - label,
        "image_0_uid": uids[0],
        "image_1_uid": uids[1],
        "best_image_uid": "tie" if label == 0.5 else uids[int(label < 0.5)],
        "has_label": True,
        "are_different": row["jpg_0"] != row["jpg_1"],
    }
    return derived | dict(row)
