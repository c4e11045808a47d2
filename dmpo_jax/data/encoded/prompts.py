"""The store of prompt embeddings: each distinct prompt once, by random access.

Prompt j is record j of the files `prompts.array_record-NNNNN` in their order; prompt 0 is the
empty prompt.
"""

import operator
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from etils import epath
from jaxtyping import Float

from dmpo_jax.data.encoded.examples import read_example, write_example
from dmpo_jax.data.encoded.shards import Shard, ShardWriter
from dmpo_jax.errors import UserError

PROMPTS = "prompts.array_record"
FILE = re.compile(rf"{re.escape(PROMPTS)}-\d+")
PER_SHARD = 1024  # 310 MB of SDXL's [77, 2048] in float16, before compression
DTYPES = ("bfloat16", "float16", "float32")


class PromptEmbedding(NamedTuple):
    """A prompt and what the text encoders made of it; bfloat16, float16 or float32."""

    text: str
    context: Float[np.ndarray, "S D"]
    pooled: Float[np.ndarray, " P"] | None = None


class PromptStore:
    """Random access to prompt embeddings; nothing is kept in memory."""

    def __init__(
        self,
        folder: epath.Path,
        counts: Sequence[int],
        *,
        total: int,
        shapes: Mapping[str, Any],
    ):
        """counts: records of each file, so that none is opened before it is read.

        shapes: of `context` and `pooled`, as in encoded.json.
        """
        self._shapes = {name: shapes.get(name) for name in ("context", "pooled")}
        files = [
            _Whole(os.fspath(folder / shard_name(k)), 0, count, count)
            for k, count in enumerate(counts)
        ]
        self._source = ArrayRecordDataSource(files)
        if len(self._source) != total:
            raise UserError(f"{folder / PROMPTS} holds {len(self._source)} prompts, not {total}")

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, j: int) -> PromptEmbedding:
        values = read_example(self._source[checked_index(j, len(self))], self._shapes)
        return PromptEmbedding(values["text"].decode(), values["context"], values.get("pooled"))


class _Whole(NamedTuple):
    """array_record's FileInstruction: a whole file."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


def shard_name(k: int) -> str:
    """The name of the store's k-th file."""
    return f"{PROMPTS}-{k:05d}"


def write_prompts(
    folder: epath.PathLike, shard: int, prompts: Iterable[PromptEmbedding]
) -> tuple[Shard, dict[str, Any]]:
    """Writes one file of the store: prompts `shard * PER_SHARD` and following.

    Returns:
        The file, and the shapes and dtypes of `context` and `pooled`.

    Raises:
        ValueError: if there is no prompt, or one is malformed, not finite or unlike the
            first, naming it. The file is then absent.
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
    """Shape and dtype, as JSON holds them."""
    return {"shape": list(array.shape), "dtype": array.dtype.name}


def check_floats(what: str, array: np.ndarray, dtypes: Sequence[str] = DTYPES) -> None:
    """ValueError, beginning with `what`, at another dtype or a value that is not finite."""
    if array.dtype.name not in dtypes:
        raise ValueError(f"{what} should be one of {dtypes}, but got {array.dtype.name}")
    if not np.isfinite(array).all():
        raise UserError(f"{what} is not finite: encode in float32, or with another VAE")


def checked_index(i: int, length: int) -> int:
    """i as an int; IndexError, which ends a for loop over a source, outside [0, length)."""
    i = operator.index(i)
    if not 0 <= i < length:
        raise IndexError(f"index {i} is outside [0, {length})")
    return i


def _shapes(prompt: PromptEmbedding) -> dict[str, Any]:
    pooled = None if prompt.pooled is None else described(prompt.pooled)
    return {"context": described(prompt.context), "pooled": pooled}


def _serialized(what: str, prompt: PromptEmbedding) -> bytes:
    arrays = {name: x for name, x in prompt._asdict().items() if x is not None and name != "text"}
    for name, array in arrays.items():
        check_floats(f"{what}: {name}", array)
    return write_example({**arrays, "text": prompt.text.encode()})
