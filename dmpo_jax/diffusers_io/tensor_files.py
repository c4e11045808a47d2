"""Reads and writes safetensors files one tensor at a time.

The library maps a file to read it, and touched pages count as the process's memory until the
file is closed. To write a file, it needs every tensor at once. Either would hold a model twice.

Format: eight bytes, the header's length (little endian); the header, JSON, padded with
spaces to a multiple of eight; the tensors. Source: https://github.com/huggingface/safetensors.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from safetensors import safe_open

from dmpo_jax import storage
from dmpo_jax.diffusers_io.folders import one_line, some
from dmpo_jax.diffusers_io.layout import Bounds
from dmpo_jax.errors import UserError

REOPEN_BYTES = 256 * 2**20  # limit of mapped pages; reopening costs milliseconds
CHUNK_BYTES = 64 * 2**20  # per write
# In the library's order, widest first, so that every tensor is aligned to its dtype.
DTYPES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class TensorFile:
    """An open file, `file`; `names` maps each tensor to its shape, in the order of the data.

    Raises:
        ValueError: naming the file, if it is truncated or not safetensors.
    """

    def __init__(self, file: epath.Path, local: epath.Path):
        self.file, self._local = file, str(local)
        try:
            handle = self._open()
            self.names = {
                name: tuple(handle.get_slice(name).get_shape()) for name in handle.offset_keys()
            }
        except Exception as error:
            with local.open("rb") as stream:
                start = stream.read(8)
            # PyTorch's zip, or a bare pickle: a safetensors' length would end in zeros.
            pickled = start[:2] == b"PK" or (start[:1] == b"\x80" and any(start[3:]))
            hint = "; it is a pickle: save it again with safe_serialization=True" if pickled else ""
            raise UserError(
                f"{file} cannot be read as safetensors: {one_line(error)}{hint}"
            ) from error
        self.release()

    def _open(self) -> Any:
        return safe_open(self._local, framework="numpy")

    def read(self, name: str, bounds: Bounds) -> np.ndarray:
        """Returns a copy of that part of the tensor, in its stored dtype."""
        if self._touched > REOPEN_BYTES:
            self.release()
        self._handle = self._handle or self._open()
        if bounds == tuple((0, n) for n in self.names[name]):
            tensor = self._handle.get_tensor(name)
        else:
            tensor = self._handle.get_slice(name)[tuple(slice(*b) for b in bounds)]
        self._touched += tensor.nbytes
        return tensor

    def metadata(self) -> dict[str, str]:
        """Returns what the file says of itself, apart from its tensors."""
        return dict((self._handle or self._open()).metadata() or {})

    def release(self) -> None:
        """Drops the mapping and its resident pages; the next read maps the file again."""
        self._handle, self._touched = None, 0


@contextlib.contextmanager
def opened(files: Mapping[epath.Path, frozenset[str]]) -> Iterator[dict[str, TensorFile]]:
    """Opens files and yields a map from each tensor name to the open file that holds it.

    Args:
        files: as `folders.weight_files` returns them. Files on object storage are staged on
            the local disk.

    Raises:
        ValueError: naming a file that cannot be read, lacks a tensor that its index
            expects there, or repeats one.
    """
    with contextlib.ExitStack() as stack:
        holders: dict[str, TensorFile] = {}
        for file, expected in files.items():
            held = TensorFile(file, stack.enter_context(storage.local_file(file)))
            if absent := sorted(expected - held.names.keys()):
                raise UserError(
                    f"{file} lacks {len(absent)} tensors that the index says it holds: "
                    f"{some(absent)}; the folder mixes two saves: copy it again"
                )
            if twice := sorted(holders.keys() & held.names.keys()):
                raise UserError(
                    f"{file} holds {len(twice)} tensors that another shard holds too: "
                    f"{some(twice)}; the folder mixes two saves: copy it again"
                )
            holders |= dict.fromkeys(held.names, held)
        yield holders


def check_finite(folder: epath.PathLike) -> None:
    """Reads every tensor of a folder's safetensors files.

    Raises:
        UserError: naming the file and the tensor: it cannot be read, or a number is not finite.
    """
    for path in sorted(epath.Path(folder).glob("*.safetensors")):
        with opened({path: frozenset()}) as holders:
            for name, file in holders.items():
                tensor = file.read(name, tuple((0, n) for n in file.names[name]))
                if wrong := int(tensor.size - np.isfinite(tensor).sum()):
                    raise UserError(f"{path}: {wrong} numbers of {name} are not finite")


def write(
    file: epath.Path | None,
    specs: Mapping[str, jax.ShapeDtypeStruct],
    produce: Callable[[str], np.ndarray | None],
) -> None:
    """Streams tensors into a file, never holding two.

    Args:
        file: destination. None requests the tensors in the same order and discards them:
            gathering one requires every process, writing it one process.
        specs: shape and dtype of each tensor.
        produce: name -> the tensor, with the shape and dtype in `specs`.

    Raises:
        ValueError: a dtype that model folders do not hold.
    """
    ranks = list(DTYPES)
    for name, spec in specs.items():
        if spec.dtype.name not in ranks:
            raise UserError(
                f"{name} is {spec.dtype.name}; a model folder holds one of {sorted(ranks)}: "
                "choose with dtype="
            )
    order = sorted(specs, key=lambda name: (ranks.index(specs[name].dtype.name), name))
    header = _header({name: specs[name] for name in order})
    with file.open("wb") if file is not None else contextlib.nullcontext() as stream:
        if stream is not None:
            stream.write(header)
        for name in order:
            tensor = produce(name)
            if stream is None:
                continue
            flat = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
            for start in range(0, flat.size, CHUNK_BYTES):
                stream.write(flat[start : start + CHUNK_BYTES].tobytes())


def _header(specs: Mapping[str, jax.ShapeDtypeStruct]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, spec in specs.items():
        start, end = end, end + nbytes(spec)
        entries[name] = {
            "dtype": DTYPES[spec.dtype.name],
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def nbytes(spec: jax.ShapeDtypeStruct) -> int:
    return spec.size * spec.dtype.itemsize
