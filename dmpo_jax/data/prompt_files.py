"""Readers of prompt files: lines of text, JSON, JSON lines and tables."""

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet
from etils import epath

from dmpo_jax import storage
from dmpo_jax.data import tables
from dmpo_jax.data.sources.files import REMOTE, check_regular
from dmpo_jax.errors import UserError

# Columns and keys, in any case; the first one present is read.
COLUMNS = ("prompt", "caption", "text", "prompts")
CATEGORIES = ("category", "style", "tag")
NEGATIVES = ("negative_prompt", "neg_prompt")
FORMATS = (".txt", ".json", ".jsonl", ".csv", ".tsv", ".parquet")


_WEIGHT = re.compile(r"\([^()]+:\d+(\.\d+)?\)")
LOG = logging.getLogger(__name__)


class Prompt(NamedTuple):
    """One sampling request; None falls back to the run's setting.

    image, mask: paths of the source image of an editing or inpainting model, and of the mask,
    white where the image is repainted. category: the group in which an evaluation reports it.
    """

    text: str
    negative_prompt: str | None = None
    seed: int | None = None
    image: str | None = None
    mask: str | None = None
    category: str | None = None


def load_prompts(path: epath.PathLike | Sequence[epath.PathLike]) -> list[Prompt]:
    """Returns the prompts of a file, or of several files, in order.

    A text file has one prompt a line. JSON is a list and JSON lines are lines of texts or of
    objects with `prompt` and, optionally, `negative_prompt`, `seed`, `image`, `mask` and
    `category`. CSV, TSV and parquet have columns of these names. `caption`, `text` or `prompts` is
    accepted for `prompt`, `neg_prompt` for `negative_prompt`, and `style` or `tag` for `category`.
    Paths are relative to this file's folder. Other keys and columns, and blank lines, are ignored.

    path: one path; or several, as a sequence or separated by commas. Of several files, each is
    the category of its prompts that name none, by its name without the suffix.

    Raises:
        ValueError: a file is missing, holds no prompt, or does not match its suffix. The message
            names the row, counted from 1, or the columns found.
    """
    files = _split(path)
    prompts = []
    for file in files:
        found = _load_file(file)
        if len(files) > 1:
            found = [p if p.category else p._replace(category=file.stem) for p in found]
        prompts += found
    if weighted := sum(bool(_WEIGHT.search(prompt.text)) for prompt in prompts):
        LOG.warning("%d prompts weight words, as in (word:1.3); that is read literally", weighted)
    return prompts


def load_texts(path: epath.PathLike | Sequence[epath.PathLike]) -> list[str]:
    """Returns only the texts of `load_prompts`."""
    return [prompt.text for prompt in load_prompts(path)]


def _split(path: epath.PathLike | Sequence[epath.PathLike]) -> list[epath.Path]:
    if not isinstance(path, str | os.PathLike):
        return [epath.Path(one) for one in path]
    whole = os.fspath(path)
    if "," not in whole or epath.Path(whole).exists():  # a name may hold commas
        return [epath.Path(whole)]
    return [epath.Path(part.strip()) for part in whole.split(",") if part.strip()]


def _load_file(file: epath.Path) -> list[Prompt]:
    if not file.exists():
        raise UserError(f"prompts file {file} does not exist: give one of {', '.join(FORMATS)}")
    check_regular(file)
    read = _READERS.get(file.suffix.lower(), _read_text)
    try:
        rows = list(read(file.read_bytes()))
    except UserError as error:
        raise UserError(f"prompts file {file} {error}") from error
    except (pa.ArrowException, ValueError, OSError, OverflowError, RecursionError) as error:
        raise UserError(f"prompts file {file} cannot be read as {file.suffix}: {error}") from error
    prompts = []
    for number, row in enumerate(rows, 1):
        try:
            prompts.append(_to_prompt(row, file.parent))
        except ValueError as error:
            raise UserError(f"prompts file {file}, row {number}: {error}") from error
    if not prompts:
        raise UserError(f"prompts file {file} holds no prompt: write one a line")
    return prompts


def _read_text(content: bytes) -> Iterator[Any]:
    if b"\0" in content:
        raise UserError("holds zero bytes: save it as UTF-8")
    lines = (line.strip() for line in re.split(r"\r\n|\r|\n", content.decode("utf-8-sig")))
    return (line for line in lines if line)


def _read_parquet(content: bytes) -> Iterator[Any]:
    source = pa.BufferReader(content)
    names = pyarrow.parquet.read_schema(source).names
    source.seek(0)
    # Images stored beside the captions are not read.
    yield from pyarrow.parquet.read_table(source, columns=_wanted(names)).to_pylist()


_READERS = {
    ".json": tables.read_json,
    ".jsonl": tables.read_json_lines,
    ".parquet": _read_parquet,
    ".csv": lambda content: tables.read_delimited(content, ",", columns=_wanted),
    ".tsv": lambda content: tables.read_delimited(content, "\t", columns=_wanted),
}


def _wanted(names: Sequence[str]) -> list[str]:
    """Returns the names of the columns to read."""
    keys = {_text_key(names), _find(names, NEGATIVES), _find(names, CATEGORIES)}
    return [name for name in names if name in keys or name in ("seed", "image", "mask")]


def _text_key(names: Sequence[str]) -> str:
    if (found := _find(names, COLUMNS)) is None:
        raise UserError(f"has no {' or '.join(COLUMNS)}, but {', '.join(names) or 'nothing'}")
    return found


def _find(names: Sequence[str], accepted: Sequence[str]) -> str | None:
    lower = {name.lower(): name for name in reversed(names)}
    return next((lower[name] for name in accepted if name in lower), None)


def _to_prompt(row: Any, folder: epath.Path) -> Prompt:
    if isinstance(row, Exception):
        raise UserError(str(row)) from row
    if isinstance(row, str):
        row = {"prompt": row}
    if not isinstance(row, Mapping):
        raise UserError(f"should be a text or an object, but is {row!r:.80}")
    names = list(row)
    text = row[_text_key(names)]
    if not isinstance(text, str):
        raise UserError(f"prompt should be a text, but is {text!r:.80}")
    texts: dict[str, Any] = {key: row.get(key) for key in ("image", "mask")}
    for key, accepted in (("negative_prompt", NEGATIVES), ("category", CATEGORIES)):
        name = _find(names, accepted)
        texts[key] = None if name is None else row[name]
    texts["category"] = texts["category"] or None
    for key, value in (texts | {"prompt": text}).items():
        if not isinstance(value, str | None):
            raise UserError(f"{key} should be a text, but is {value!r:.80}")
        (value or "").encode()  # ValueError for half of a character, as an escape of JSON may be
    for key in ("image", "mask"):
        if texts[key] and storage.is_remote(texts[key]) and not texts[key].startswith(REMOTE):
            raise UserError(f"{key} should be a path, but is a URL, {texts[key]!r:.80}")
        texts[key] = str(folder / texts[key]) if texts[key] else None
    return Prompt(text, seed=_to_seed(row.get("seed")), **texts)


def _to_seed(value: Any) -> int | None:
    if value is None:
        return None
    try:
        seed = int(value)
    except (ValueError, TypeError, OverflowError):
        seed = -1
    if isinstance(value, bool | float) or not 0 <= seed < 2**32:
        raise UserError(f"seed should be a whole number below 2**32, but is {value!r:.80}")
    return seed
