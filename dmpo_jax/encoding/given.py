"""Embeddings of prompts that another program made, in place of the model's text encoders.

A folder in one of two layouts:

    encoded pairs, of which only the prompts are read
    prompts.txt or prompts.jsonl, and *.safetensors

The prompts are one a line; in the second file each is a JSON string or an object with `prompt`.
Row i of the tensors is prompt i, counted over the files in the order of their names:

    context  [N, S, D]  floats, the width D that the model attends to
    pooled   [N, P]     floats, if the model takes pooled embeddings
    lengths  [N]        integers, if the model takes them: positions of the context that are text

The empty prompt is among them: an empty line, or "".
"""

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from etils import epath

from dmpo_jax import diffusers_io, storage
from dmpo_jax.data.encoded import records
from dmpo_jax.data.encoded.meta import MARKER
from dmpo_jax.data.encoded.prompt_store import ARRAYS, PromptEmbedding
from dmpo_jax.diffusers_io.tensor_files import TensorFile
from dmpo_jax.errors import UserError
from dmpo_jax.families import Family
from dmpo_jax.families.family import Facts

LOG = logging.getLogger(__name__)
TEXT, LINES = "prompts.txt", "prompts.jsonl"
TENSORS = ("context", "pooled", "lengths")
FLOATS = ("bfloat16", "float16", "float32", "float64")
OPTION = "data.prompts"
Shapes = Mapping[str, tuple[int, ...]]  # of one prompt's tensors


@runtime_checkable
class _Rows(Protocol):
    """Where embeddings lie. texts: in order. shapes: of one prompt's, by the names of TENSORS."""

    texts: Sequence[str]
    shapes: Shapes
    digest: str

    def read(self, row: int) -> dict[str, np.ndarray | None]: ...


class Given:
    """An open folder of embeddings: `text in given`, and `given[text]` -> PromptEmbedding.

    digest: of its content, sampled. Of a prompt that is there twice the first embedding counts.
    """

    def __init__(self, folder: epath.Path, rows: _Rows, family: Family):
        self.folder, self.digest = folder, rows.digest
        self._rows, self._family = rows, family
        self._lengths = "lengths" in rows.shapes
        self._number: dict[str, int] = {}
        for number, text in enumerate(rows.texts):
            self._number.setdefault(text, number)

    def __contains__(self, text: str) -> bool:
        return text in self._number

    def __len__(self) -> int:
        return len(self._number)

    def __getitem__(self, text: str) -> PromptEmbedding:
        found = self._rows.read(self._number[text])
        dtype = np.dtype(self._family.stored)
        what = f"{self.folder}: the embedding of {text[:40]!r}"
        floats = {}
        for name in ("context", "pooled"):
            array = found[name]
            if array is not None and array.dtype.name not in FLOATS:
                raise UserError(f"{what}: {name} should be floats, but is {array.dtype.name}")
            with np.errstate(over="ignore"):
                floats[name] = None if array is None else array.astype(dtype)
            if array is not None and not np.isfinite(floats[name]).all():
                raise UserError(f"{what} is not finite as {dtype.name}: make it anew")
        length = found["lengths"]
        if length is not None:
            context = floats["context"]
            if not 0 < int(length) <= len(context):
                raise UserError(
                    f"{what} has {int(length)} positions of text (lengths), but should have 1 to "
                    f"{len(context)}"
                )
            length = np.asarray(length, np.int32)
        return PromptEmbedding(text, floats["context"], floats["pooled"], length)

    def check(self, facts: Facts) -> None:
        """Raises UserError unless the embeddings are what a model with these facts takes."""
        shapes, named = self._rows.shapes, f"--config.{OPTION}={self.folder}"
        if "" not in self:
            raise UserError(
                f"{named} has no embedding of the empty prompt, which prompt dropout and guidance "
                f"take: add an empty line to {TEXT}, and its row"
            )
        width = shapes["context"][-1]
        if width != facts.context_width:
            raise UserError(
                f"{named} holds context of width {width}, but the model attends to width "
                f"{facts.context_width}: embed the prompts with the text encoders that it was "
                "trained with"
            )
        pooled = shapes["pooled"][-1] if "pooled" in shapes else 0
        if pooled != facts.pooled_width:
            raise UserError(
                f"{named} holds pooled embeddings of width {pooled}, but the model takes "
                f"{facts.pooled_width} (0 is none): embed the prompts with its own text encoders"
            )
        if facts.lengths and "lengths" not in shapes:
            raise UserError(
                f"{named} lacks lengths, the number of positions of each prompt's context that are "
                f"text, which a {self._family.name} model takes: add them"
            )
        if self._lengths and not facts.lengths:
            LOG.info("%s: lengths are not used by a %s model", named, self._family.name)


@contextlib.contextmanager
def open_given(folder: epath.PathLike, pipeline: epath.PathLike) -> Iterator[Given]:
    """Opens a folder of embeddings, and checks that they fit a pipeline's model.

    Args:
        pipeline: its folder; text encoders and tokenizers may be missing.

    Raises:
        ValueError: the folder is missing, of neither layout or damaged; or its embeddings are not
            what the model takes. Names the folder.
    """
    folder = epath.Path(folder)
    path, family = diffusers_io.load_family(pipeline)
    facts = family.facts(diffusers_io.read_json(path / family.component / "config.json"))
    with contextlib.ExitStack() as stack:
        if (folder / MARKER).exists():
            rows: _Rows = _Encoded(folder, facts.lengths)
        else:
            rows = _Tensors(folder, stack, facts.lengths)
        given = Given(folder, rows, family)
        given.check(facts)
        yield given


class _Encoded:
    """The prompts of a folder of encoded pairs."""

    def __init__(self, folder: epath.Path, lengths: bool):
        pairs = records.open_pairs(folder)
        self._store, self._lengths = pairs.prompts, lengths
        self.texts: Sequence[str] = [self._store[j].text for j in range(len(self._store))]
        named = dict(zip(TENSORS, ARRAYS, strict=True))
        specs = {name: getattr(pairs.meta.arrays, ours) for name, ours in named.items()}
        self.shapes: Shapes = {name: spec.shape for name, spec in specs.items() if spec is not None}
        hashes = pairs.meta.hashes or pairs.meta.files
        self.digest = storage.hash_json(
            {k: x for k, x in hashes.items() if k.startswith("prompts")}
        )

    def read(self, row: int) -> dict[str, np.ndarray | None]:
        found = self._store[row]
        length = found.length if self._lengths else None
        return {"context": found.context, "pooled": found.pooled, "lengths": length}


class _Held(NamedTuple):
    """An open file, and the number of its first prompt."""

    file: TensorFile
    first: int


class _Tensors:
    """Lists of prompts beside safetensors files."""

    def __init__(self, folder: epath.Path, stack: contextlib.ExitStack, lengths: bool):
        self._lengths = lengths
        listed = [folder / name for name in (TEXT, LINES) if (folder / name).exists()]
        paths = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
        if len(listed) != 1 or not paths:
            raise UserError(
                f"--config.{OPTION}={folder} should hold {TEXT} or {LINES}, and *.safetensors; or "
                f"be a folder of encoded pairs; found {_names(folder)}"
            )
        self.texts: Sequence[str] = _read_texts(listed[0])
        self._files: list[_Held] = []
        self.shapes: Shapes = {}
        count = 0
        for path in paths:
            file = TensorFile(path, stack.enter_context(storage.local_file(path)))
            rows, shapes = _shapes(file)
            self.shapes = self.shapes or shapes
            if shapes != self.shapes:
                raise UserError(
                    f"{path} holds a prompt's tensors as {shapes}, but {paths[0].name} as "
                    f"{self.shapes}: all files should hold the same"
                )
            self._files.append(_Held(file, count))
            count += rows
        if count != len(self.texts):
            raise UserError(
                f"{listed[0]} lists {len(self.texts)} prompts, but the tensors beside it have "
                f"{count} rows: they should be the same prompts in the same order"
            )
        sampled = {path.name: storage.sample_file(path) for path in (*listed, *paths)}
        self.digest = storage.hash_json(sampled)

    def read(self, row: int) -> dict[str, np.ndarray | None]:
        file, first = next(held for held in reversed(self._files) if held.first <= row)
        found: dict[str, np.ndarray | None] = dict.fromkeys(TENSORS)
        for name in self.shapes:
            if name == "lengths" and not self._lengths:
                continue
            bounds = ((row - first, row - first + 1), *((0, n) for n in self.shapes[name]))
            found[name] = file.read(name, bounds)[0]
        return found


def _shapes(file: TensorFile) -> tuple[int, Shapes]:
    """Returns the number of rows of a file, and the shape of each tensor's row.

    Raises:
        UserError: a tensor is missing, of another name, rank or number of rows.
    """
    ranks = {"context": 3, "pooled": 2, "lengths": 1}
    if "context" not in file.names or set(file.names) - set(TENSORS):
        raise UserError(
            f"{file.file} should hold context and, if the model takes them, pooled and lengths, "
            f"but holds {', '.join(sorted(file.names)) or 'nothing'}"
        )
    rows = {shape[0] if shape else 0 for shape in file.names.values()}
    wrong = [name for name, shape in file.names.items() if len(shape) != ranks[name]]
    if wrong or len(rows) != 1:
        raise UserError(
            f"{file.file} should hold context [N, S, D], pooled [N, P] and lengths [N], but holds "
            f"{dict(file.names)}"
        )
    return rows.pop(), {name: shape[1:] for name, shape in sorted(file.names.items())}


def _read_texts(path: epath.Path) -> list[str]:
    """Returns the prompts of a list, one a line; UserError names a line that holds none."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}") from error
    lines = [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]
    if path.name == TEXT:
        return lines
    texts = []
    for number, line in enumerate(lines, start=1):
        try:
            value: Any = json.loads(line)
        except ValueError:
            value = None
        text = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise UserError(
                f'{path}, line {number}: should be a JSON string, or an object with "prompt", but '
                f"is {line[:40]!r}"
            )
        texts.append(text)
    return texts


def _names(folder: epath.Path) -> str:
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return ", ".join(names[:6]) + (" ..." if len(names) > 6 else "") or "nothing"
