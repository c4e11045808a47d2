"""Files of prompts: lines of text, JSON, or tables."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet
from etils import epath

from dmpo_jax.data import tables
from dmpo_jax.errors import UserError

COLUMNS = ("prompt", "caption")  # the text's, in any case; the first that is there
FORMATS = (".txt", ".json", ".jsonl", ".csv", ".tsv", ".parquet")


class Prompt(NamedTuple):
    """What one image is to be drawn from; what is None is the run's to say.

    image, mask: files; the source of an editing or inpainting model, and where to paint
    (white).
    """

    text: str
    negative_prompt: str | None = None
    seed: int | None = None
    image: str | None = None
    mask: str | None = None


def load_prompts(path: epath.PathLike) -> list[Prompt]:
    """The prompts of a file, in order.

    A text file has one a line. JSON is a list, JSON lines are lines, of texts or of objects
    with `prompt` and, if need be, `negative_prompt`, `seed`, `image` and `mask`; CSV, TSV and
    parquet have columns of these names (`caption` will do for `prompt`). Files are relative
    to this one. Other keys and columns, and blank lines of text, are left out.

    Raises:
        ValueError: the file is missing, holds no prompt or is not what its name says; names
            the row, counted from 1, and what columns were found.
    """
    file = epath.Path(path)
    if not file.exists():
        raise UserError(f"prompts file {file} does not exist: give one of {', '.join(FORMATS)}")
    read = _READERS.get(file.suffix.lower(), _read_text)
    try:
        rows = list(read(file.read_bytes()))
    except (pa.ArrowInvalid, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"prompts file {file} cannot be read as {file.suffix}: {error}") from error
    except ValueError as error:
        raise UserError(f"prompts file {file} {error}") from error
    prompts = []
    for number, row in enumerate(rows, 1):
        try:
            prompts.append(_to_prompt(row, file.parent))
        except ValueError as error:
            raise UserError(f"prompts file {file}, row {number}: {error}") from error
    if not prompts:
        raise UserError(f"prompts file {file} holds no prompt: write one a line")
    return prompts


def load_texts(path: epath.PathLike) -> list[str]:
    """The texts alone of `load_prompts`."""
    return [prompt.text for prompt in load_prompts(path)]


def _read_text(content: bytes) -> Iterator[Any]:
    lines = (line.strip() for line in content.decode("utf-8-sig").splitlines())
    return (line for line in lines if line)


def _read_parquet(content: bytes) -> Iterator[Any]:
    source = pa.BufferReader(content)
    names = pyarrow.parquet.read_schema(source).names
    source.seek(0)
    # A set of images with captions is read for its captions alone.
    yield from pyarrow.parquet.read_table(source, columns=_wanted(names)).to_pylist()


def _read_delimited(content: bytes, delimiter: str) -> Iterator[Any]:
    for row in tables.read_delimited(content, delimiter, columns=_wanted).to_pylist():
        yield {key: value or None for key, value in row.items()}  # an empty cell says nothing


_READERS = {
    ".json": tables.read_json,
    ".jsonl": lambda content: map(tables.read_line, tables.split_lines(content)),
    ".parquet": _read_parquet,
    ".csv": lambda content: _read_delimited(content, ","),
    ".tsv": lambda content: _read_delimited(content, "\t"),
}


def _wanted(names: Sequence[str]) -> list[str]:
    """The columns that are read, of all."""
    column = _text_key(names)
    return [name for name in names if name == column or name in Prompt._fields[1:]]


def _text_key(names: Sequence[str]) -> str:
    lower = {name.lower(): name for name in reversed(names)}
    for wanted in COLUMNS:
        if wanted in lower:
            return lower[wanted]
    raise UserError(f"has no {' or '.join(COLUMNS)}, but {', '.join(names) or 'nothing'}")


def _to_prompt(row: Any, folder: epath.Path) -> Prompt:
    if isinstance(row, str):
        row = {"prompt": row}
    if not isinstance(row, Mapping):
        raise UserError(f"should be a text or an object, but is {row!r}")
    text = row[_text_key(list(row))]
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"prompt should be a text, but is {text!r}")
    texts: dict[str, Any] = {key: row.get(key) for key in ("negative_prompt", "image", "mask")}
    for key, value in texts.items():
        if not isinstance(value, str | None):
            raise UserError(f"{key} should be a text, but is {value!r}")
    for key in ("image", "mask"):
        texts[key] = str(folder / texts[key]) if texts[key] else None
    return Prompt(text.strip(), seed=_to_seed(row.get("seed")), **texts)


def _to_seed(value: Any) -> int | None:
    if value is None:
        return None
    try:
        seed = int(value)
    except (ValueError, TypeError):
        seed = -1
    if isinstance(value, bool | float) or not 0 <= seed < 2**32:
        raise UserError(f"seed should be a whole number below 2**32, but is {value!r}")
    return seed
