"""Store of prompt embeddings: each distinct prompt once, with random access.

Prompt j is record j of the files `prompts.array_record-NNNNN` in their order. Prompt 0 is the
empty prompt.
"""

import math
import os
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from etils import epath
from jaxtyping import Float, Int

from dmpo_jax.data.encoded.examples import read_example, write_example
from dmpo_jax.data.encoded.meta import Arrays
from dmpo_jax.data.encoded.shards import Shard, ShardWriter, read_record
from dmpo_jax.errors import UserError

PROMPTS = "prompts.array_record"
FILE = re.compile(rf"{re.escape(PROMPTS)}-\d+")
PER_SHARD = 1024  # 310 MB of SDXL's [77, 2048] in float16, before compression
ARRAYS = ("context", "pooled", "length")
DTYPES = ("bfloat16", "float16", "float32")
FIND_BYTES = 2**29  # of embeddings that a search reads: a second or two


class PromptEmbedding(NamedTuple):
    """A prompt and its text embeddings; bfloat16, float16 or float32.

    length: number of context positions that are text, int32; None if the model does not use it.
    """

    text: str
    context: Float[np.ndarray, "S D"]
    pooled: Float[np.ndarray, " P"] | None = None
    length: Int[np.ndarray, ""] | None = None


class PromptStore:
    """Random access to prompt embeddings; nothing is kept in memory."""

    def __init__(self, folder: epath.Path, counts: Sequence[int], *, total: int, arrays: Arrays):
        """counts: records of each file, so that no file is opened before it is read.

        arrays: specs of the arrays that the records hold.
        """
        self._arrays = {name: getattr(arrays, name) for name in ARRAYS}
        names = [os.fspath(folder / shard_name(k)) for k in range(len(counts))]
        files: Any = [_Whole(f, 0, n, n) for f, n in zip(names, counts, strict=True)]
        self._source = ArrayRecordDataSource(files)
        self._files = list(zip(names, counts, strict=True))
        if len(self._source) != total:
            raise UserError(f"{folder / PROMPTS} holds {len(self._source)} prompts, not {total}")

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, j: int) -> PromptEmbedding:
        record = read_record(self._source, j, self._files)
        values = read_example(record, self._arrays)
        text = values.pop("text").decode()
        return PromptEmbedding(text, **values)

    def find(self, texts: Collection[str]) -> dict[str, PromptEmbedding]:
        """Returns {text: embedding} of those texts that are among the first prompts.

        Reads prompts in order until all are found, at least one more than there are texts, and
        otherwise no more than FIND_BYTES hold: the store has no index by text.
        """
        most = max(len(texts) + 1, FIND_BYTES // self.prompt_bytes)
        found: dict[str, PromptEmbedding] = {}
        for j in range(min(most, len(self))):
            if len(found) == len(set(texts)):
                break
            prompt = self[j]
            if prompt.text in texts:
                found[prompt.text] = prompt
        return found

    @property
    def prompt_bytes(self) -> int:
        """Bytes of one prompt's arrays, uncompressed."""
        specs = [spec for spec in self._arrays.values() if spec is not None]
        return sum(math.prod(spec.shape) * np.dtype(spec.dtype).itemsize for spec in specs)


class _Whole(NamedTuple):
    """array_record's FileInstruction for a complete file."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


def shard_name(k: int) -> str:
    """Returns the name of the store's k-th file."""
    return f"{PROMPTS}-{k:05d}"


def write_prompts(
    folder: epath.PathLike, shard: int, prompts: Iterable[PromptEmbedding]
) -> tuple[Shard, dict[str, Any]]:
    """Writes one file of the store: prompts `shard * PER_SHARD` and following.

    Returns:
        The file, and the shapes and dtypes of ARRAYS.

    Raises:
        ValueError: there is no prompt, or one is malformed, not finite or unlike the first; names
            the prompt. The file is then absent.
    """
    first = None
    with ShardWriter(folder, shard_name(shard)) as writer:
        for number, prompt in enumerate(prompts, start=shard * PER_SHARD):
            what = f"prompt {number} ({prompt.text[:40]!r})"
            if (number == 0) != (prompt.text == ""):
                raise ValueError(f"prompt 0 must be the empty prompt, and no other, but got {what}")
            got = _shapes(prompt)
            first = first or got
            if got != first or prompt.context.ndim != 2:
                raise ValueError(f"{what} should be {first}, context [S, D], but got {got}")
            writer.write(_serialized(what, prompt))
        if first is None:
            raise ValueError("prompts are needed, the empty prompt first, but got none")
        return writer.close(), first


def described(array: np.ndarray) -> dict[str, Any]:
    """Returns shape and dtype, JSON-serialisable."""
    return {"shape": list(array.shape), "dtype": array.dtype.name}


def check_floats(what: str, array: np.ndarray, dtypes: Sequence[str] = DTYPES) -> None:
    """Raises ValueError, starting with `what`, for another dtype or a value that is not finite."""
    if array.dtype.name not in dtypes:
        raise UserError(f"{what} should be one of {dtypes}, but got {array.dtype.name}")
    if not np.isfinite(array).all():
        raise UserError(f"{what} is not finite: encode in float32, or with another VAE")


def _shapes(prompt: PromptEmbedding) -> dict[str, Any]:
    arrays = {name: getattr(prompt, name) for name in ARRAYS}
    return {name: None if x is None else described(x) for name, x in arrays.items()}


def _serialized(what: str, prompt: PromptEmbedding) -> bytes:
    arrays = {name: x for name, x in prompt._asdict().items() if x is not None and name != "text"}
    for name in ("context", "pooled"):
        if name in arrays:
            check_floats(f"{what}: {name}", arrays[name])
    length = arrays.get("length")
    if length is not None and not (
        length.dtype == np.int32 and length.shape == () and 0 < length <= len(prompt.context)
    ):
        raise UserError(
            f"{what}: length should be an int32 in [1, {len(prompt.context)}], but got {length!r}"
        )
    return write_example({**arrays, "text": prompt.text.encode()})
